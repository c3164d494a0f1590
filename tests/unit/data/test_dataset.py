import collections
import itertools
import json
import math
from functools import partial

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.errors import DatasetError


def ints(dataset):
    return [int(element) for element in dataset]


def test_from_arrays_gives_read_only_views():
    x = np.arange(12.0).reshape(6, 2)
    batch = next(iter(Dataset.from_arrays({"x": x}).batch(4)))["x"]
    assert np.shares_memory(batch, x)
    assert not batch.flags.writeable
    assert x.flags.writeable


def test_from_arrays_keeps_the_structure():
    point = collections.namedtuple("point", "x y")
    nest = point(np.arange(3), {"z": [np.arange(3), np.arange(6).reshape(3, 2)]})
    batch = next(iter(Dataset.from_arrays(nest).shuffle(seed=0).batch(3)))
    assert type(batch) is point
    assert sorted(batch.x.tolist()) == [0, 1, 2]
    np.testing.assert_array_equal(batch.y["z"][1], np.arange(6).reshape(3, 2)[batch.x])


def test_a_shuffled_batch_of_a_strided_array_is_right():
    x = np.arange(40).reshape(4, 10).T
    batch = next(iter(Dataset.from_arrays(x).shuffle(seed=0).batch(10)))
    np.testing.assert_array_equal(np.sort(batch[:, 0]), x[:, 0])


@pytest.mark.parametrize(
    ("nest", "words"),
    [
        ({"x": np.zeros(3), "y": [np.zeros(4)]}, "nest['x'] has 3, nest['y'][0] has 4"),
        ((np.zeros(3), 1.0), "nest[1]"),
        ([1, 2, 3], "lists are containers"),
        (None, "NoneType"),
        ((), "at least one array"),
    ],
)
def test_from_arrays_refuses_and_names_the_leaf(nest, words):
    with pytest.raises(DatasetError, match=r".*") as caught:
        Dataset.from_arrays(nest)
    assert words in str(caught.value)


@pytest.mark.parametrize("wrong", [True, 1.0, "2", None, -1, [1]])
@pytest.mark.parametrize(
    "build",
    [
        lambda value: Dataset.range(value),
        lambda value: Dataset.range(4).batch(value),
        lambda value: Dataset.range(4).take(value),
        lambda value: Dataset.range(4).skip(value),
        lambda value: Dataset.range(4).shuffle(seed=value),
        lambda value: Dataset.range(4).shard(value, 0),
        lambda value: Dataset.range(4).shard(2, value),
        lambda value: Dataset.range(4).repeat("none" if value is None else value),
    ],
)
def test_wrong_counts_are_refused(build, wrong):
    with pytest.raises(DatasetError, match=r"expected .*; got .*; "):
        build(wrong)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Dataset.range(3).batch(0), "at least 1"),
        (lambda: Dataset.range(3).batch(2, drop_remainder=1), "drop_remainder"),
        (lambda: Dataset.range(3).shard(2, 2), "0 to 1"),
        (lambda: Dataset.range(3).map(3), "function"),
        (lambda: Dataset.range(3).filter(None), "function"),
        (lambda: Dataset.range(3).repeat().shuffle(seed=0), "before repeat"),
        (lambda: Dataset.range(3).filter(bool).shuffle(seed=0), "materialise"),
        (lambda: Dataset.range(3).shuffle(seed=0, reshuffle_each_epoch=1), "reshuffle"),
        (lambda: Dataset.from_sequence({"a": 1}), "from_arrays"),
        (lambda: Dataset.from_sequence(iter([1])), "from_iterable"),
        (lambda: Dataset.from_iterable([1, 2]), "lambda"),
        (lambda: list(Dataset.from_iterable(lambda: 3)), "iterable"),
        (lambda: Dataset([1]), "from_arrays"),
    ],
)
def test_wrong_arguments_are_refused(build, words):
    with pytest.raises(DatasetError) as caught:
        build()
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_transforms():
    assert ints(Dataset.range(10).skip(2).take(3)) == [2, 3, 4]
    assert ints(Dataset.range(3).repeat(2)) == [0, 1, 2] * 2
    assert ints(Dataset.range(7).shard(3, 1)) == [1, 4]
    assert ints(Dataset.range(7).filter(lambda x: x % 2)) == [1, 3, 5]
    batches = [b.tolist() for b in Dataset.range(5).repeat(2).batch(4)]
    assert batches == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4]]
    assert [b.tolist() for b in Dataset.range(6).batch(3).batch(2)] == [[[0, 1, 2], [3, 4, 5]]]
    assert ints(Dataset.range(0).repeat()) == []
    assert ints(Dataset.range(5).filter(lambda x: False).repeat()) == []


@pytest.mark.parametrize("sequential", [False, True])
def test_lengths(sequential):
    base = Dataset.range(7)
    if sequential:
        base = Dataset.from_iterable(lambda: range(7))
    expected = lambda n: None if sequential else n  # noqa: E731
    assert base.length == expected(7)
    assert base.batch(3).length == expected(3)
    assert base.batch(3, drop_remainder=True).length == expected(2)
    assert base.repeat(2).length == expected(14)
    assert base.repeat(0).length == 0
    assert base.skip(9).length == expected(0)
    assert base.shard(3, 1).length == expected(2)
    assert base.take(0).length == 0
    assert base.repeat().batch(3).skip(1).length == (None if sequential else math.inf)
    if sequential:
        with pytest.raises(TypeError, match="not known"):
            len(base)
        assert list(base) == list(range(7))
    else:
        assert len(base) == 7


def pipelines(base):
    yield base
    yield base.take(5)
    yield base.skip(2)
    yield base.shard(3, 2)
    yield base.repeat(3)
    yield base.batch(3)
    yield base.batch(3, drop_remainder=True)
    yield base.map(lambda x: x + 1).batch(4)
    yield base.repeat(2).skip(3).take(20).shard(2, 1).batch(2)
    yield base.batch(2, drop_remainder=True).batch(2, drop_remainder=True)


def test_sequential_and_random_access_agree():
    sequential = Dataset.from_iterable(lambda: (np.int64(i) for i in range(11)))
    for a, b in zip(pipelines(Dataset.range(11)), pipelines(sequential), strict=True):
        left, right = list(a), list(b)
        assert len(left) == len(right) == len(a)
        for x, y in zip(left, right, strict=True):
            np.testing.assert_array_equal(x, y)


def test_batches_are_the_stacked_elements():
    base = Dataset.range(11).shuffle(seed=3)
    for dataset in (
        base,
        base.repeat(3),
        base.repeat(2).shuffle(seed=1),
        base.repeat(2).shard(2, 0),
    ):
        flat = [x for batch in dataset.batch(4) for x in batch.tolist()]
        assert flat == ints(dataset)


def test_iterating_starts_at_epoch_0_each_time():
    dataset = Dataset.range(20).shuffle(seed=4)
    assert ints(dataset) == ints(dataset) != list(range(20))


def test_repeat_reshuffles():
    runs = np.reshape(ints(Dataset.range(20).shuffle(seed=4).repeat(3)), (3, 20)).tolist()
    assert all(sorted(run) == list(range(20)) for run in runs)
    assert runs[0] != runs[1] != runs[2] != runs[0]
    once = Dataset.range(20).shuffle(seed=4, reshuffle_each_epoch=False).repeat(2)
    runs = np.reshape(ints(once), (2, 20)).tolist()
    assert runs[0] == runs[1]


def test_take_ends_an_endless_dataset():
    endless = Dataset.range(3).repeat()
    assert ints(endless.take(7)) == [0, 1, 2, 0, 1, 2, 0]
    assert [b.tolist() for b in itertools.islice(endless.batch(2), 2)] == [[0, 1], [2, 0]]
    with pytest.raises(TypeError, match="endless"):
        len(endless)


class Flaky:
    """Source whose elements fail at the first access."""

    def __init__(self, n):
        self.n, self.seen = n, set()

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return self(index)

    def __call__(self, x):
        if int(x) not in self.seen:
            self.seen.add(int(x))
            raise OSError(f"disk {x}")
        return x


def passes(flaky, x):
    return flaky(x) >= 0


def each(flaky):
    return (flaky(x) for x in range(flaky.n))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Dataset.from_sequence(Flaky(5)),
        lambda: Dataset.from_sequence(Flaky(5)).batch(1).map(lambda b: b[0]),
        lambda: Dataset.range(5).map(Flaky(5)),
        lambda: Dataset.range(5).map(Flaky(5)).filter(lambda x: True),
        lambda: Dataset.range(5).filter(partial(passes, Flaky(5))),
        lambda: Dataset.from_iterable(partial(each, Flaky(5))),
    ],
)
def test_an_error_in_user_code_loses_nothing(build):
    iterator, got, failures = iter(build()), [], []
    while True:
        try:
            got.append(int(next(iterator)))
        except OSError as error:
            failures.append(error)
        except StopIteration:
            break
    assert got == list(range(5))
    assert len(failures) == 5
    for index, error in enumerate(failures):
        assert f"element {index} of" in error.__notes__[0]
        assert "epoch 0" in error.__notes__[0]


def test_the_note_names_index_source_and_transform():
    def explode(x):
        raise KeyError("k")

    dataset = Dataset.range(9).shuffle(seed=5).map(explode)
    with pytest.raises(KeyError) as caught:
        next(iter(dataset))
    (note,) = caught.value.__notes__
    first = ints(Dataset.range(9).shuffle(seed=5))[0]
    assert "explode" in note
    assert "element 0 of range(9).shuffle(seed=5)" in note
    assert f"index {first} of the source" in note


@pytest.mark.parametrize("kind", ["map", "filter", "sequence"])
def test_stop_iteration_in_user_code_does_not_end_the_epoch(kind):
    class Ends(Flaky):
        def __call__(self, x):
            raise StopIteration

    dataset = {
        "map": Dataset.range(3).map(Ends(3)),
        "filter": Dataset.range(3).filter(Ends(3)),
        "sequence": Dataset.from_sequence(Ends(3)),
    }[kind]
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(iter(dataset))


def test_a_used_up_iterator_from_the_factory_is_refused():
    iterator = iter(range(3))
    dataset = Dataset.from_iterable(lambda: iterator)
    assert list(dataset) == [0, 1, 2]
    with pytest.raises(DatasetError, match="inside the factory"):
        list(dataset)


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ([np.zeros(2), np.zeros(3)], "pad or crop"),
        ([(1, 2), (1, 2, 3)], "one structure"),
        ([None, None], "NoneType"),
        ([{"a": object()}], "element['a']"),
    ],
)
def test_elements_that_do_not_stack_are_refused(elements, words):
    with pytest.raises(DatasetError) as caught:
        list(Dataset.from_sequence(elements).batch(2))
    assert words in str(caught.value)


def test_shuffle_takes_constant_memory():
    huge = Dataset.range(10**12).shuffle(seed=0)
    assert len(set(ints(huge.take(100)))) == 100
    assert len(set(next(iter(huge.batch(10_000))).tolist())) == 10_000
    assert json.dumps(huge.node.pipeline)
    assert repr(huge) == "Dataset.range(1000000000000).shuffle(seed=0)"
