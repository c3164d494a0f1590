import collections
import gc
import itertools
import json
import sys
import tracemalloc

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.options import InputOptions
from dvkernels.errors import DatasetError


class Counting:
    """Source of the numbers 100 * epoch + i; records how it was opened and what was read."""

    def __init__(self, length=10, fails_at=()):
        self.length, self.fails_at = length, set(fails_at)
        self.opened, self.read, self.num_closed = [], [], 0

    def open(self, epoch, state):
        self.opened.append((epoch, state))
        return CountingReader(self, epoch, 0 if state is None else state["next"])


class CountingReader:
    def __init__(self, source, epoch, place):
        self.source, self.epoch, self.position = source, epoch, {"next": place}

    def __next__(self):
        place = self.position["next"]
        if place == self.source.length:
            raise StopIteration
        if place in self.source.fails_at:
            self.source.fails_at.remove(place)
            raise OSError("gone for a moment")
        self.position["next"] += 1
        self.source.read.append(100 * self.epoch + place)
        return np.int64(100 * self.epoch + place)

    def state(self):
        return self.position  # always the same dict: a reader need not copy

    def close(self):
        self.source.num_closed += 1


def ints(elements):
    return [int(x) for x in elements]


def test_each_iterator_has_a_reader_of_its_own():
    dataset = Dataset.from_source(Counting(4))
    first, second = iter(dataset), iter(dataset)
    assert [int(next(first)), int(next(first)), int(next(second))] == [0, 1, 0]
    assert ints(first) == [2, 3]
    assert ints(second) == [1, 2, 3]


def test_a_resume_opens_the_source_at_its_state_and_reads_nothing_twice():
    source = Counting()
    distributed = DistributedDataset(Dataset.from_source(source).batch(3), 2)
    iterator = iter(distributed)
    next(iterator)
    next(iterator)
    state = json.loads(json.dumps(iterator.state_dict()))
    iterator.close()
    assert state["version"] == 2
    assert state["memory"] == [[0, 6, {"next": 6}]]
    source.opened.clear()
    source.read.clear()
    resumed = iter(distributed)
    resumed.load_state_dict(state)
    assert [x for batch in resumed for part in batch.values for x in part] == [6, 7, 8, 9]
    assert source.opened == [(0, {"next": 6})]
    assert source.read == [6, 7, 8, 9]


def test_filter_and_repeat_resume_without_replay():
    source = Counting(10)
    dataset = Dataset.from_source(source).filter(lambda x: x % 3 == 0).repeat(2).batch(1)
    distributed = DistributedDataset(dataset, 1)
    iterator = iter(distributed)
    for _ in range(6):  # 0 3 6 9, and 102 105 of epoch 1
        batch = next(iterator)
    assert batch.values[0].tolist() == [105]
    state = json.loads(json.dumps(iterator.state_dict()))
    source.read.clear()
    resumed = iter(distributed)
    resumed.load_state_dict(state)
    assert [int(batch.values[0][0]) for batch in resumed] == [108]
    assert source.read == [106, 107, 108, 109]


def test_readers_are_closed():
    source = Counting()
    with iter(DistributedDataset(Dataset.from_source(source).batch(2), 1)) as iterator:
        next(iterator)
        assert source.num_closed == 0
        state = iterator.state_dict()
    assert source.num_closed == 1
    assert iterator.state_dict() == state
    list(Dataset.from_source(source))
    assert source.num_closed == 2


def test_after_an_error_the_source_is_opened_at_its_state():
    source = Counting(6, fails_at=[4])
    iterator = iter(Dataset.from_source(source).batch(3))
    assert next(iterator).tolist() == [0, 1, 2]
    with pytest.raises(OSError, match="moment") as caught:
        next(iterator)
    assert "Counting.__next__ failed at element 4" in caught.value.__notes__[0]
    assert next(iterator).tolist() == [3, 4, 5]
    assert source.opened == [(0, None), (0, {"next": 3})]


def test_take_skip_shard_and_zip_resume_as_well():
    source = Counting(20)
    dataset = Dataset.from_source(source).skip(2).shard(3, 1).take(5)
    both = dataset.zip(Dataset.range(4), Dataset.from_source(Counting(9)).filter(lambda x: x > 1))
    wanted = [(3, 0, 2), (6, 1, 3), (9, 2, 4), (12, 3, 5)]
    assert [tuple(ints(element)) for element in both] == wanted
    distributed = DistributedDataset(both.batch(1), 1)
    for count in range(5):
        iterator = iter(distributed)
        distributed.set_epoch(0)
        iterator = iter(distributed)
        list(itertools.islice(iterator, count))
        resumed = iter(distributed)
        resumed.load_state_dict(json.loads(json.dumps(iterator.state_dict())))
        rest = [tuple(int(part.values[0][0]) for part in batch) for batch in resumed]
        assert rest == wanted[count:]


@pytest.mark.parametrize("count", range(7))
def test_other_sources_of_a_zip_are_replayed(count):
    beside = Dataset.from_sequence(range(4)).filter(lambda x: x != 1).repeat(2)
    both = DistributedDataset(Dataset.from_source(Counting(9)).zip(beside).batch(1), 1)
    wanted = list(zip(range(6), [0, 2, 3, 0, 2, 3], strict=True))
    iterator = iter(both)
    list(itertools.islice(iterator, count))
    resumed = iter(both)
    resumed.load_state_dict(json.loads(json.dumps(iterator.state_dict())))
    rest = [tuple(int(part.values[0][0]) for part in batch) for batch in resumed]
    assert rest == wanted[count:]


@pytest.mark.parametrize("is_dealt", [False, True])
@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.range(6).batch(2),
        Dataset.from_iterable(lambda: range(6)).map(lambda x: x).batch(2),
        Dataset.from_source(Counting(6)).filter(lambda x: True).shuffle(seed=0, window=1).batch(2),
    ],
)
def test_an_interrupt_between_any_two_calls_loses_no_batch(dataset, is_dealt):
    def interrupted(at):
        """Return all elements, and whether the interrupt, raised at the given call, was seen."""
        iterator = iter(DistributedDataset(dataset, 1, is_dealt=is_dealt))
        batches = [next(iterator)]
        calls, here = itertools.count(), sys._getframe()

        def profile(frame, event, called):
            # CPython checks for signals when a function begins, and after a C function.
            inside = frame is not here and event in ("call", "c_return")
            if inside and next(calls) == at:
                sys.setprofile(None)
                raise KeyboardInterrupt

        gc.disable()  # an interrupt in a callback of the garbage collector would be lost
        try:
            sys.setprofile(profile)
            batches.append(next(iterator))
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
            gc.enable()
        came = len(batches) == 1
        resumed = iter(DistributedDataset(dataset, 1, is_dealt=is_dealt))
        resumed.load_state_dict(json.loads(json.dumps(iterator.state_dict())))
        rests = [[*batches, *rest] for rest in (iterator, resumed)]
        return came, [[x for b in whole for x in b.values[0].tolist()] for whole in rests]

    for at in itertools.count():
        came, both = interrupted(at)
        assert both == [[0, 1, 2, 3, 4, 5]] * 2, at
        if not came:
            break
    assert at > 5


def test_resume_points_are_thinned_where_little_is_delivered():
    source = Counting(60_000)
    rare = Dataset.from_source(source).filter(lambda x: x % 25_000 == 24_999).batch(1)
    iterator = iter(DistributedDataset(rare, 1))
    source.read = collections.deque(maxlen=0)
    tracemalloc.start()
    try:
        assert next(iterator).values[0] == [24_999]
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()
    state = json.loads(json.dumps(iterator.state_dict()))
    for resumed in (iterator, iter(DistributedDataset(rare, 1))):
        resumed.load_state_dict(state)
        assert [batch.values[0].tolist() for batch in resumed] == [[49_999]]
    assert 20_000 < source.opened[-1][1]["next"] <= 25_000


def test_pipelines_without_stateful_sources_keep_their_state_format():
    iterator = iter(DistributedDataset(Dataset.range(9).filter(lambda x: x > 2).batch(2), 1))
    next(iterator)
    state = iterator.state_dict()
    assert state["version"] == 1
    assert "memory" not in state


@pytest.mark.parametrize(
    "damage",
    [
        {"memory": []},
        {"memory": None},
        {"memory": [3]},
        {"memory": [[0, -1, None], [0, 0, 0]]},
        {"memory": [[0, 1, None]]},
        {"memory": [[0, 1, "x"], [0, 1, {"next": 1}]]},
        {"memory": [[0, 1, 1], [0, 1, {"next": 1}], [0, 0, 0]]},
        {"version": 1},
    ],
)
def test_damaged_resume_points_are_refused_and_change_nothing(damage):
    dataset = Dataset.from_source(Counting()).filter(lambda x: x >= 0).batch(2)
    iterator = iter(DistributedDataset(dataset, 1))
    next(iterator)
    before = iterator.state_dict()
    if damage == {"memory": []}:
        damage = {"memory": [], "epoch": -1}
    with pytest.raises(DatasetError, match="damaged"):
        iterator.load_state_dict({**before, **damage})
    assert iterator.state_dict() == before
    assert next(iterator).values[0].tolist() == [2, 3]


def test_the_state_cannot_be_changed_from_outside():
    iterator = iter(DistributedDataset(Dataset.from_source(Counting()).batch(2), 1))
    next(iterator)
    iterator.state_dict()["memory"][0][2]["next"] = 77
    assert iterator.state_dict()["memory"] == [[0, 2, {"next": 2}]]


class Squares:
    """An iterable that is its own iterator; the state is kept by the loader or by the iterator."""

    def __init__(self, keeps="iterable"):
        self.place, self.keeps, self.started = 0, keeps, 0

    def __iter__(self):
        self.started += 1
        return self if self.keeps == "iterator" else self._go()

    def _go(self):
        while self.place < 10:
            yield next(self)

    def __next__(self):
        if self.place == 10:
            raise StopIteration
        self.place += 1
        return (self.place - 1) ** 2

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


@pytest.mark.parametrize("keeps", ["iterable", "iterator"])
def test_stateful_iterables_resume_at_their_state(keeps):
    made = []

    def factory():
        made.append(Squares(keeps))
        return made[-1]

    dataset = Dataset.from_iterable(factory, stateful=True).filter(lambda x: x != 4).batch(2)
    iterator = iter(DistributedDataset(dataset, 1))
    next(iterator), next(iterator)
    state = json.loads(json.dumps(iterator.state_dict()))
    resumed = iter(DistributedDataset(dataset, 1))
    resumed.load_state_dict(state)
    assert [batch[0].tolist() for batch in resumed] == [[25, 36], [49, 64], [81]]
    assert made[-1].started == 1
    assert next(iter(dataset)).tolist() == [0, 1]


def test_stateful_iterables_must_have_a_state():
    dataset = Dataset.from_iterable(lambda: [1, 2], stateful=True)
    with pytest.raises(DatasetError, match="leave stateful out"):
        next(iter(dataset))
    with pytest.raises(DatasetError, match="from_iterable"):
        Dataset.from_iterable([1, 2], stateful=True)


class Wrong:
    def __init__(self, reader):
        self.reader = reader

    def open(self, epoch, state):
        return self.reader


class Stateless:
    def __next__(self):
        return 1


class UncopiedState(Stateless):
    def state(self):
        return (x for x in ())


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (iter([1]), "list_iterator without state; add what is missing"),
        (None, "NoneType without __next__ and state"),
        (UncopiedState(), "expected a state that can be copied.*generator"),
    ],
)
def test_readers_of_a_source_are_checked(reader, words):
    with pytest.raises(DatasetError, match=words):
        next(iter(Dataset.from_source(Wrong(reader))))


@pytest.mark.parametrize("source", [Counting, [1, 2], open])
def test_objects_other_than_sources_are_refused(source):
    with pytest.raises(DatasetError, match=r"expected an object with open\(epoch, state\)"):
        Dataset.from_source(source)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_skipped_and_prefetched_elements_do_not_count(prefetch):
    def picky(x):
        if x % 4 == 1:
            raise ArithmeticError("left out")
        return x

    source = Counting(20)
    dataset = Dataset.from_source(source).map(picky, num_workers=2).batch(3)
    options = InputOptions(on_error="skip", prefetch=prefetch)
    distributed = DistributedDataset(dataset, 1, options=options)
    with iter(distributed) as iterator:
        assert next(iterator).values[0].tolist() == [0, 2, 3]
        assert next(iterator).values[0].tolist() == [4, 6, 7]
        state = json.loads(json.dumps(iterator.state_dict()))
    source.read.clear()
    with iter(distributed) as resumed:
        resumed.load_state_dict(state)
        assert next(resumed).values[0].tolist() == [8, 10, 11]
    assert source.read[0] == 8
