"""Laws of datasets shared by several workers, each of which is a thread."""

import json
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import examples

from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.options import InputOptions
from dvkernels.errors import DatasetError

WORLDS = st.sampled_from([[1], [2], [1, 1], [2, 2], [1, 2], [3, 1, 1], [1, 1, 1, 1], [2, 1, 3, 1]])
SEEDS = st.integers(0, 2**70)


class Workers:
    """One distributed dataset per worker; all take their steps at the same time."""

    def __init__(self, replicas, make, is_dealt=False, state=None, **options):
        self._barrier = threading.Barrier(len(replicas), timeout=20)
        self._words = [None] * len(replicas)
        self._pool = ThreadPoolExecutor(len(replicas))
        self.iterators = []
        for worker, count in enumerate(replicas):
            distributed = DistributedDataset(
                make(worker, len(replicas)), count, share=WorkerShare(replicas, worker),
                exchange=self._exchange_of(worker), options=InputOptions(**options),
                is_dealt=is_dealt,
            )  # fmt: skip
            self.iterators.append(iter(distributed))
            if state is not None:
                self.iterators[-1].load_state_dict(json.loads(json.dumps(state)))

    def _exchange_of(self, worker):
        def exchange(word):
            self._words[worker] = word
            self._barrier.wait()
            words = list(self._words)
            self._barrier.wait()
            return words

        return exchange

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown()
        for iterator in self.iterators:
            iterator.close()

    def outcomes(self):
        """Return the next step of each worker: a batch, None at the end, or an error."""

        def step(iterator):
            try:
                optional = iterator.get_next_as_optional()
                return optional.get_value() if optional.has_value() else None
            except Exception as error:
                return error

        return list(self._pool.map(step, self.iterators))

    def step(self):
        """Return the parts of all replicas, or None at the end, which is that of all workers."""
        batches = self.outcomes()
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
        assert len({batch is None for batch in batches}) == 1
        return None if batches[0] is None else [part for b in batches for part in b.values]

    def steps(self, most=None):
        found = []
        while (most is None or len(found) < most) and (parts := self.step()) is not None:
            found.append(parts)
        return found

    def state(self):
        states = [iterator.state_dict() for iterator in self.iterators]
        assert all(state == states[0] for state in states)
        return states[0]


def alike(dataset):
    return lambda worker, num_workers: dataset


def lists(steps):
    return [[part.tolist() for part in parts] for parts in steps]


def flat(steps):
    return [x for parts in steps for part in parts for x in part.tolist()]


@st.composite
def datasets(draw):
    length = draw(st.integers(0, 30))
    dataset = Dataset.range(length)
    if draw(st.booleans()):
        dataset = Dataset.from_iterable(lambda: iter(range(length)))
    elif draw(st.booleans()):
        dataset = dataset.shuffle(seed=draw(SEEDS))
    if draw(st.booleans()):
        dataset = dataset.map(lambda x: 3 * x)
    if draw(st.booleans()):
        dataset = dataset.filter(lambda x: x % 4 != 1)
    dataset = dataset.batch(draw(st.integers(1, 9)), drop_remainder=draw(st.booleans()))
    if draw(st.booleans()):
        dataset = dataset.map(lambda x: x + 1)
    if draw(st.booleans()):
        dataset = dataset.repeat(2)
    return dataset.prefetch(draw(st.integers(0, 2)))


@settings(max_examples=examples(60), deadline=None)
@given(dataset=datasets(), replicas=WORLDS, most=st.integers(0, 8), after=WORLDS)
def test_rows_of_workers_are_the_parts_of_a_single_worker(dataset, replicas, most, after):
    whole = DistributedDataset(dataset, sum(replicas))
    expected = [list(batch.values) for batch in whole]
    with Workers(replicas, alike(dataset), auto_shard_policy="data") as workers:
        begun = workers.steps(most)
        state = workers.state()
        assert lists(begun + workers.steps()) == lists(expected)
    with Workers(after, alike(dataset), state=state, auto_shard_policy="data") as resumed:
        assert flat(resumed.steps()) == flat(expected[len(begun) :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of twelve empty files, named by their numbers."""
    path = tmp_path_factory.mktemp("files")
    for number in range(12):
        (path / f"{number:02d}").touch()
    return path


@st.composite
def file_datasets(draw):
    """Function that builds a dataset of a folder, its batch size, its elements (file, offset), and
    whether they keep their order."""
    sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=12))
    window = draw(st.sampled_from([None, 3, 10]))
    keeps = draw(st.booleans())
    batch_size = draw(st.integers(1, 12))
    prefetch = draw(st.integers(0, 2))

    def build(folder):
        def read(path):
            number = int(path[-2:])
            yield from (np.array([number, place]) for place in range(sizes[number]))

        dataset = Dataset.from_files(sorted(folder.iterdir())[: len(sizes)], read)
        if window is not None:
            dataset = dataset.shuffle(seed=3, window=window)
        if not keeps:
            dataset = dataset.filter(lambda x: x.sum() % 3 != 0)
        dataset = dataset.map(lambda x: x + 0).batch(batch_size)
        return dataset.map(lambda x: x[:, :2]).prefetch(prefetch)

    elements = [
        (number, place)
        for number, size in enumerate(sizes)
        for place in range(size)
        if keeps or (number + place) % 3
    ]
    return build, batch_size, elements, window is None


@settings(max_examples=examples(80), deadline=None)
@given(
    described=file_datasets(), policy=st.sampled_from(["auto", "file"]),
    plan=st.lists(st.tuples(WORLDS, st.integers(0, 3)), min_size=1, max_size=4), last=WORLDS,
)  # fmt: skip
def test_files_are_read_once_by_changing_workers(folder, described, policy, plan, last):
    build, batch_size, elements, in_order = described
    dataset = build(folder)
    worlds = [world for world, _ in plan] + [last]
    if len(dataset.files) < max(map(len, worlds)) or batch_size < max(map(sum, worlds)):
        policy = "auto"
    seen, state = [], None
    for replicas, most in [*plan, (last, None)]:
        with Workers(replicas, alike(dataset), state=state, auto_shard_policy=policy) as workers:
            steps = workers.steps(most)
            state = workers.state()
        for worker, parts in enumerate(zip(*steps, strict=True)):
            assert all(part.shape[1:] == (2,) for part in parts), worker
        seen += [tuple(element) for parts in steps for part in parts for element in part.tolist()]
    assert sorted(seen) == elements
    if in_order:
        for number in range(12):
            of_file = [place for where, place in seen if where == number]
            assert of_file == sorted(of_file)


def test_each_worker_opens_its_own_files_only(folder):
    opened = [set(), set()]

    def make(worker, num_workers):
        def read(path):
            opened[worker].add(int(path[-2:]))
            return [np.array([int(path[-2:])])] * 3

        return Dataset.from_files(sorted(folder.iterdir()), read).batch(4)

    with Workers([1, 1], make) as workers:
        assert len(workers.steps()) == 9
    assert opened == [set(range(0, 12, 2)), set(range(1, 12, 2))]


def test_only_the_own_rows_are_computed():
    asked = [[], []]

    def make(worker, num_workers):
        return Dataset.range(8).map(lambda x: asked[worker].append(int(x)) or x).batch(4)

    with Workers([1, 1], make) as workers:
        workers.steps()
    assert asked == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_worker_without_files_left_reads_nothing_again(folder):
    opened = []

    def read(path):
        opened.append(path[-2:])
        return [np.zeros(1)] * (9 if path.endswith("0") else 1)

    dataset = Dataset.from_files(sorted(folder.iterdir())[:2], read).batch(2).prefetch(2)
    with Workers([1, 1], alike(dataset)) as workers:
        assert len(workers.steps()) == 9
    assert sorted(opened) == ["00", "01"]


def test_a_dropped_remainder_is_that_of_all_workers(folder):
    def read(path):
        return map(np.int64, range(7 if path.endswith("0") else 0))

    dataset = Dataset.from_files(sorted(folder.iterdir())[:2], read).batch(2, drop_remainder=True)
    with Workers([1, 1], alike(dataset)) as workers:
        assert flat(workers.steps()) == list(range(6))


def test_different_file_orders_are_refused(folder):
    def make(worker, num_workers):
        files = sorted(folder.iterdir(), reverse=bool(worker))
        return Dataset.from_files(files, lambda path: [np.zeros(1)]).batch(2)

    with Workers([1, 1], make) as workers:
        for error in workers.outcomes():
            with pytest.raises(DatasetError, match=r"on worker 0, .*on worker 1; .*sort the paths"):
                raise error


def test_different_positions_are_refused(folder):
    dataset = Dataset.from_files(sorted(folder.iterdir()), lambda path: [np.zeros(1)] * 3).batch(4)
    with Workers([1, 1], alike(dataset)) as workers:
        start, state = workers.state(), (workers.step(), workers.state())[1]
        workers.iterators[0].load_state_dict(start)  # as if only this worker had loaded
        for error in workers.outcomes():
            with pytest.raises(DatasetError, match="worker 0 begins an iterator"):
                raise error
        assert [iterator.state_dict() for iterator in workers.iterators] == [start, state]
        workers.iterators[0].load_state_dict(state)
        assert len(workers.steps()) == 8


def test_a_short_remainder_ends_the_epoch_of_all(folder):
    def read(path):
        return [np.zeros(1)] * (3 if path.endswith("0") else 5)

    files = sorted(folder.iterdir())[:2]  # 3 and 5 elements, batches of 2 for each worker
    dataset = Dataset.from_files(files, read).batch(4, drop_remainder=True)
    with Workers([1, 1], alike(dataset), auto_shard_policy="file") as workers:
        assert [[len(part) for part in parts] for parts in workers.steps()] == [[2, 2]]
        assert workers.step() is None


@settings(max_examples=examples(30), deadline=None)
@given(
    length=st.integers(0, 20), rounds=st.integers(1, 3),
    replicas=st.sampled_from([[1], [3], [1, 1], [2, 2, 2]]),
)  # fmt: skip
def test_off_gives_everything_to_every_worker(length, rounds, replicas):
    dataset = Dataset.range(length).batch(rounds * sum(replicas))
    with Workers(replicas, alike(dataset), auto_shard_policy="off") as workers:
        steps = workers.steps()
    for first in range(0, sum(replicas), replicas[0]):
        assert flat(parts[first : first + replicas[0]] for parts in steps) == list(range(length))


@settings(max_examples=examples(40), deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=4, max_size=4), replicas=WORLDS,
    most=st.integers(0, 4),
)  # fmt: skip
def test_workers_with_datasets_of_their_own_end_together(lengths, replicas, most):
    def make(worker, num_workers):
        return Dataset.range(lengths[worker]).map(lambda x: 100 * worker + x).batch(2)

    wanted = [100 * worker + x for worker in range(len(replicas)) for x in range(lengths[worker])]
    with Workers(replicas, make, is_dealt=True) as workers:
        begun = workers.steps(most)
        state = workers.state()
        rest = workers.steps()
    assert sorted(flat(begun + rest)) == wanted
    assert all(part.shape[1:] == () for parts in begun + rest for part in parts)
    with Workers(replicas, make, is_dealt=True, state=state) as resumed:
        assert lists(resumed.steps()) == lists(rest)
    if len(replicas) == 2 and begun:
        with pytest.raises(DatasetError, match="expected the state of 3 workers; got that of 2"):
            Workers([1, 1, 1], make, is_dealt=True, state=state)


def test_an_error_of_one_worker_is_raised_on_all_and_the_step_is_retried(folder):
    unplugged = []

    def read(path):
        for place in range(4):
            if place == 2 and path.endswith("1") and unplugged:
                raise OSError(unplugged.pop())
            yield np.array([int(path[-2:]), place])

    dataset = Dataset.from_files(sorted(folder.iterdir())[:2], read).batch(4)
    with Workers([1, 1], alike(dataset)) as workers:
        before, state = workers.step(), workers.state()
        unplugged.append("unplugged")
        theirs, own = workers.outcomes()
        assert isinstance(theirs, DatasetError)
        assert "worker 1 could not read its batch: OSError: unplugged" in str(theirs)
        assert isinstance(own, OSError)
        assert workers.state() == state
        rest = workers.steps()
    assert sorted(map(tuple, flat_rows([before, *rest]))) == [
        (f, p) for f in (0, 1) for p in range(4)
    ]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_datasets_made_per_worker_continue_until_all_have_ended(folder, prefetch):
    def make(worker, num_workers):
        elements = map(np.int64, range(100 * worker, 100 * worker + 3 + 4 * worker))
        files = sorted(folder.iterdir())[:1]
        data = Dataset.from_files(files, lambda path: elements).batch(2, drop_remainder=True)
        return data.prefetch(prefetch)

    with Workers([1, 1], make, is_dealt=True) as workers:
        assert lists(workers.steps()) == [
            [[0, 1], [100, 101]],
            [[], [102, 103]],
            [[], [104, 105]],
        ]


def test_elements_that_cannot_be_empty_fail_on_all_workers():
    with Workers([1, 1], lambda worker, _: Dataset.range(1 + worker), is_dealt=True) as workers:
        workers.step()
        for _ in range(2):
            for error in workers.outcomes():
                with pytest.raises(DatasetError, match="worker 0 has no elements left"):
                    raise error


def live(worker):
    """A live source of the numbers worker * 100 to worker * 100 + 3."""
    arrived = queue.SimpleQueue()
    for number in range(4):
        arrived.put(np.array([100 * worker + number]))
    arrived.put(None)
    return Dataset.from_live(arrived)


def test_live_sources_of_workers_can_be_distributed():
    with Workers([1, 1], lambda worker, _: live(worker), is_dealt=True) as workers:
        assert lists(workers.steps(3)) == [[[n], [100 + n]] for n in range(3)]
        with pytest.raises(DatasetError, match="that a live source has delivered cannot"):
            workers.state()
        assert lists(workers.steps()) == [[[3], [103]]]
    beside = [lambda: Dataset.range(4).batch(1), lambda: live(1)]
    with Workers([1, 1], lambda worker, _: beside[worker](), is_dealt=True) as workers:
        workers.step()
        with pytest.raises(DatasetError, match="that of worker 1 cannot"):
            workers.iterators[0].state_dict()


@pytest.mark.parametrize("is_dealt", [False, True])
def test_elements_that_arrived_are_not_lost_when_another_worker_fails(is_dealt):
    unplugged = [OSError("unplugged")]

    def check(x):
        if 102 in x and unplugged:
            raise unplugged.pop()
        return x

    def make(worker, num_workers):
        return live(worker).map(check)

    with Workers([1, 1], make, is_dealt=is_dealt, auto_shard_policy="off") as workers:
        begun = workers.steps(2)
        assert [type(error) for error in workers.outcomes()] == [DatasetError, OSError]
        assert sorted(flat(begun + workers.steps())) == [0, 1, 2, 3, 100, 101, 102, 103]


def flat_rows(steps):
    return [row for parts in steps for part in parts for row in part.tolist()]


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda d: d.batch(4), {"auto_shard_policy": "file"}, "2 files for 3 workers"),
        (lambda d: d.take(3).batch(4), {"auto_shard_policy": "file"}, "take(3) counts elements"),
        (lambda d: d, {"auto_shard_policy": "file"}, "where batch() is needed"),
        (lambda d: d.batch(2), {"auto_shard_policy": "file"}, "2 files for 3 workers"),
        (lambda d: d.batch(4), {"auto_shard_policy": "off"}, "a multiple of 3"),
        (lambda d: Dataset.range(9).batch(3), {"auto_shard_policy": "file"}, "not from_files"),
        (lambda d: Dataset.from_live(print), {}, "auto_shard_policy='off'"),
    ],
)  # fmt: skip
def test_datasets_that_cannot_be_sharded_are_refused_at_once(folder, build, options, message):
    dataset = build(Dataset.from_files(sorted(folder.iterdir())[:2], lambda path: []))
    with pytest.raises(DatasetError) as caught:
        Workers([1, 1, 1], alike(dataset), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"format": "zip"}, "that of something else"),
        ({"format": "dvkernels.data.iterator"}, "got 'dvkernels.data.iterator', that of an iter"),
        ({"version": 2}, "newer"),
        ({"epoch": -1}, "epoch"),
        ({"extra": 1}, "also has extra"),
        ({"workers": {}}, "that of {}"),
        ({"workers": [{}, {}]}, "lacks format"),
    ],
)
def test_a_damaged_state_of_workers_changes_nothing(fault, words):
    make = alike(Dataset.range(8).batch(2))
    with Workers([1, 1], make, is_dealt=True) as workers:
        workers.step()
        state = workers.state()
        for iterator in workers.iterators:
            with pytest.raises(DatasetError) as caught:
                iterator.load_state_dict({**state, **fault})
            assert words in str(caught.value)
        assert workers.state() == state
    alone = iter(DistributedDataset(Dataset.range(8).batch(2), 1, is_dealt=True))
    with pytest.raises(DatasetError, match="that of several workers with datasets of their own"):
        alone.load_state_dict(state)


@pytest.mark.parametrize("lanes", [None, [], "12", [1, -1], [1.5], {"0": 1}])
def test_damaged_lanes_are_refused(folder, lanes):
    dataset = Dataset.from_files(sorted(folder.iterdir()), lambda path: [np.zeros(1)]).batch(4)
    with Workers([1, 1], alike(dataset)) as workers:
        workers.step()
        state = {**workers.state(), "lanes": lanes}
        for iterator in workers.iterators:
            with pytest.raises(DatasetError, match="lanes"):
                iterator.load_state_dict(state)
        assert workers.step() is not None
