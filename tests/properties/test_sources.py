"""An iterator saved anywhere resumes there, for any source and any transforms."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import examples

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.options import InputOptions

REPLICAS = st.sampled_from([1, 2, 3])
FILES = 5


class Numbers:
    """Source of the numbers below ``length``, rotated by the epoch."""

    def __init__(self, length):
        self.length = length
        self.num_read = 0

    def open(self, epoch, state):
        return NumbersReader(self, epoch, *(state or (0,)))


class NumbersReader:
    def __init__(self, source, epoch, place):
        self.source, self.epoch, self.place = source, epoch, place

    def __next__(self):
        if self.place == self.source.length:
            raise StopIteration
        self.place += 1
        self.source.num_read += 1
        return np.int64((self.place - 1 + self.epoch) % self.source.length)

    def state(self):
        return (self.place,)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for number in range(FILES):
        np.save(folder / f"{number}.npy", 10 * number + np.arange(number))
    return sorted(folder.glob("*.npy"))


@st.composite
def transformed(draw, dataset):
    """Up to four transforms of any kind, then batches."""
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["map", "filter", "window", "repeat", "cut", "shard", "zip"]))
        if kind == "map":
            dataset = dataset.map(abs)
        elif kind == "filter":
            dataset = dataset.filter(lambda x: x % 3 != 1)
        elif kind == "window":
            dataset = dataset.shuffle(seed=draw(st.integers(0, 9)), window=draw(st.integers(1, 9)))
        elif kind == "repeat":
            dataset = dataset.repeat(draw(st.integers(1, 3)))
        elif kind == "cut":
            dataset = dataset.skip(draw(st.integers(0, 3))).take(draw(st.integers(0, 40)))
        elif kind == "shard":
            dataset = dataset.shard(2, draw(st.integers(0, 1)))
        else:
            dataset = dataset.zip(dataset.skip(1)).map(lambda pair: pair[0] + pair[1])
    return dataset.batch(draw(st.integers(1, 7)))


def flat(batches):
    return [x for batch in batches for part in batch.values for x in part.tolist()]


def check_resumption(dataset, data):
    before, after = data.draw(REPLICAS), data.draw(REPLICAS)
    epoch = data.draw(st.integers(0, 2))

    def started(replicas):
        options = InputOptions(prefetch=data.draw(st.sampled_from([0, 0, 2])))
        distributed = DistributedDataset(dataset, replicas, options=options)
        distributed.set_epoch(epoch)
        return iter(distributed)

    with started(1) as whole:
        batches = [flat([batch]) for batch in whole]
    at = data.draw(st.integers(0, len(batches)))
    with started(before) as iterator:
        for expected in batches[:at]:
            assert flat([next(iterator)]) == expected
        state = json.loads(json.dumps(iterator.state_dict()))
    with started(after) as resumed:
        resumed.get_next_as_optional()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert [flat([batch]) for batch in resumed] == batches[at:]


@settings(max_examples=examples(120), deadline=None)
@given(length=st.integers(0, 25), data=st.data())
def test_a_stateful_source(length, data):
    check_resumption(data.draw(transformed(Dataset.from_source(Numbers(length)))), data)


@settings(max_examples=examples(60), deadline=None)
@given(length=st.integers(0, 25), data=st.data())
def test_an_iterable_is_replayed(length, data):
    dataset = Dataset.from_iterable(lambda: map(np.int64, range(length)))
    check_resumption(data.draw(transformed(dataset)), data)


@settings(max_examples=examples(60), deadline=None)
@given(random_access=st.booleans(), order=st.permutations(range(FILES)), data=st.data())
def test_files(paths, random_access, order, data):
    chosen = [paths[number] for number in order]
    dataset = Dataset.from_files(chosen, np.load, random_access=random_access)
    check_resumption(data.draw(transformed(dataset)), data)


@settings(max_examples=examples(60), deadline=None)
@given(length=st.integers(1, 60), size=st.integers(1, 5), window=st.integers(1, 9), data=st.data())
def test_a_stateful_source_is_not_replayed(length, size, window, data):
    source = Numbers(length)
    dataset = Dataset.from_source(source).filter(lambda x: x % 2).shuffle(seed=0, window=window)
    distributed = DistributedDataset(dataset.repeat(2).batch(size), 1)
    num_batches = len(list(distributed))
    at = data.draw(st.integers(0, num_batches))
    iterator = iter(distributed)
    for _ in range(at):
        next(iterator)
    resumed = iter(distributed)
    resumed.load_state_dict(json.loads(json.dumps(iterator.state_dict())))
    source.num_read = 0
    list(resumed)
    assert source.num_read <= 2 * length
    if at:
        # At most the current window is read again, twice its length before the filter.
        left = 2 * length - 2 * (at * size)
        assert source.num_read <= max(left, 0) + 2 * (window + 1) + 2 * size + 2


@settings(max_examples=examples(60), deadline=None)
@given(
    length=st.integers(0, 60), window=st.integers(1, 70), seed=st.integers(0, 9),
    epoch=st.integers(0, 5),
)  # fmt: skip
def test_a_windowed_shuffle_permutes_and_does_not_depend_on_random_access(
    length, window, seed, epoch
):
    orders = []
    for dataset in (Dataset.range(length), Dataset.from_iterable(lambda: range(length))):
        shuffled = dataset.shuffle(seed=seed, window=window).batch(4)
        distributed = DistributedDataset(shuffled, 1)
        distributed.set_epoch(epoch)
        orders.append(flat(distributed))
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(length))
    assert all(abs(x - place) < window for place, x in enumerate(orders[0]))
