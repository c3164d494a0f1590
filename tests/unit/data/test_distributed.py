import json

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.errors import ContextError, DatasetError, DeviceError
from dvkernels.values.distributed import PerReplica


def parts(batch):
    return [part.tolist() for part in batch.values]


@pytest.mark.parametrize(
    ("n", "size", "replicas", "expected"),
    [
        (8, 4, 2, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        (9, 4, 2, [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8], []]]),
        (8, 8, 3, [[[0, 1, 2], [3, 4, 5], [6, 7]]]),
        (4, 4, 3, [[[0, 1], [2], [3]]]),
        (1, 4, 2, [[[0], []]]),
        (0, 4, 2, []),
    ],
)
def test_batches_are_split_evenly(n, size, replicas, expected):
    distributed = DistributedDataset(Dataset.range(n).batch(size), replicas)
    assert [parts(batch) for batch in distributed] == expected
    assert len(distributed) == len(expected)


def test_parts_are_views_and_the_nest_is_kept():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    for nest in (x, (x, y), {"x": x, "y": [y]}):
        batch = next(iter(DistributedDataset(Dataset.from_arrays(nest).batch(4), 2)))
        leaf = batch if nest is x else batch[0] if isinstance(nest, tuple) else batch["x"]
        assert isinstance(leaf, PerReplica)
        assert all(np.shares_memory(part, x) for part in leaf.values)
    assert isinstance(batch["y"][0], PerReplica)


def test_devices_are_passed_to_per_replica():
    batch = next(iter(DistributedDataset(Dataset.range(4).batch(2), 2, ["cpu:0", "cpu:1"])))
    assert [str(device) for device in batch.devices] == ["cpu:0", "cpu:1"]
    with pytest.raises(DeviceError):
        DistributedDataset(Dataset.range(4), 2, ["cpu:0"])


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.range(4),
        Dataset.from_sequence([1, 2]),
        Dataset.from_sequence([None]),
        Dataset.from_sequence([(np.zeros(2), np.zeros(3))]),
        Dataset.from_sequence([{"a": np.zeros(2), "b": 3}]),
    ],
)
def test_unbatched_elements_are_refused(dataset):
    iterator = iter(DistributedDataset(dataset, 2))
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"call \.batch\(global_batch_size\)"):
            next(iterator)
    assert iterator.state_dict()["position"] == 0


def test_each_iter_is_the_next_epoch():
    distributed = DistributedDataset(Dataset.range(50).shuffle(seed=0).batch(50), 1)
    epochs = [parts(batch)[0] for _ in range(3) for batch in distributed]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    distributed.set_epoch(1)
    assert parts(next(iter(distributed)))[0] == epochs[1]
    assert parts(next(iter(distributed)))[0] == epochs[2]
    for wrong in (-1, True, 1.0, None):
        with pytest.raises(DatasetError, match="epoch"):
            distributed.set_epoch(wrong)


def test_loading_a_state_sets_the_next_epoch():
    distributed = DistributedDataset(Dataset.range(4).batch(2), 1)
    iterator = iter(distributed)
    iterator.load_state_dict({**iterator.state_dict(), "epoch": 5})
    assert iter(distributed).state_dict()["epoch"] == 6


def test_get_next_as_optional():
    iterator = iter(DistributedDataset(Dataset.range(2).batch(2), 1))
    first = iterator.get_next_as_optional()
    assert first.has_value()
    assert parts(first.get_value()) == [[0, 1]]
    for _ in range(2):
        last = iterator.get_next_as_optional()
        assert not last.has_value()
        with pytest.raises(DatasetError, match="has_value"):
            last.get_value()
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)


def test_close():
    with iter(DistributedDataset(Dataset.range(4).batch(2), 1)) as iterator:
        next(iterator)
    iterator.close()
    assert iterator.state_dict()["position"] == 1
    for use in (
        lambda: next(iterator),
        iterator.get_next_as_optional,
        lambda: iterator.load_state_dict(iterator.state_dict()),
        iterator.__enter__,
    ):
        with pytest.raises(DatasetError, match="closed"):
            use()


def test_close_ends_the_generator_of_the_user():
    ended = []

    def count():
        try:
            yield from range(10)
        finally:
            ended.append(True)

    iterator = iter(DistributedDataset(Dataset.from_iterable(count).batch(2), 1))
    next(iterator)
    iterator.close()
    assert ended == [True]


def test_the_context_is_checked_first():
    members = []

    def refuse(member):
        members.append(member)
        raise ContextError(member)

    iterator = iter(DistributedDataset(Dataset.range(4).batch(2), 1, check_context=refuse))
    for use in (lambda: next(iterator), iterator.get_next_as_optional):
        with pytest.raises(ContextError):
            use()
    assert members == ["next(iterator)", "get_next_as_optional"]
    distributed = DistributedDataset(Dataset.range(4).batch(2), 1, check_context=refuse)
    with pytest.raises(ContextError):
        next(iter(distributed))


@pytest.mark.parametrize("sequential", [False, True])
def test_a_failed_next_leaves_the_iterator_usable(sequential):
    fails = {2}

    def once(x):
        if int(x) in fails:
            fails.clear()
            raise KeyError(int(x))
        return x

    dataset = Dataset.range(6).map(once)
    if sequential:
        dataset = dataset.filter(lambda x: True)
    iterator = iter(DistributedDataset(dataset.batch(2), 2))
    assert parts(next(iterator)) == [[0], [1]]
    with pytest.raises(KeyError):
        next(iterator)
    assert iterator.state_dict()["position"] == 1
    assert [parts(batch) for batch in iterator] == [[[2], [3]], [[4], [5]]]


def fitting_state():
    return iter(DistributedDataset(Dataset.range(8).batch(2), 2)).state_dict()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "NoneType"),
        ("{}", "json.loads"),
        ({}, "lacks format"),
        ({**fitting_state(), "extra": 1}, "also has extra"),
        ({**fitting_state(), "format": "zip"}, "'zip'"),
        ({**fitting_state(), "version": 4}, "newer"),
        ({**fitting_state(), "version": 3}, "lanes"),
        ({**fitting_state(), "version": "1"}, "version"),
        ({**fitting_state(), "epoch": -1}, "epoch"),
        ({**fitting_state(), "epoch": True}, "epoch"),
        ({**fitting_state(), "position": 1.5}, "position"),
        ({**fitting_state(), "position": 5}, "at most 4"),
        ({**fitting_state(), "pipeline": "range(8)"}, "list of strings"),
        ({**fitting_state(), "pipeline": ["range(8)", 3]}, "list of strings"),
        ({**fitting_state(), "pipeline": ["range(8)", "batch(4)"]}, "was batch(4)"),
        ({**fitting_state(), "pipeline": ["range(8)"]}, "was nothing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state, words):
    iterator = iter(DistributedDataset(Dataset.range(8).batch(2), 2))
    next(iterator)
    before = iterator.state_dict()
    with pytest.raises(DatasetError) as caught:
        iterator.load_state_dict(state)
    assert words in str(caught.value)
    assert iterator.state_dict() == before
    assert parts(next(iterator)) == [[2], [3]]


def test_the_state_is_small_json():
    text = json.dumps(fitting_state())
    assert json.loads(text) == fitting_state()
    assert len(text) < 200


def test_a_dataset_is_needed():
    with pytest.raises(DatasetError, match="from_arrays"):
        DistributedDataset([1, 2], 2)
    with pytest.raises(DatasetError, match="num_replicas"):
        DistributedDataset(Dataset.range(3), 0)


def dealt(dataset, num_replicas):
    return DistributedDataset(dataset, num_replicas, is_dealt=True)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("sequential", [False, True])
def test_per_replica_batches_are_assigned_in_turn(count, sequential):
    source = Dataset.from_iterable(lambda: iter(range(11))) if sequential else Dataset.range(11)
    batches = [batch.tolist() for batch in source.batch(2)]
    steps = list(dealt(source.batch(2), count))
    parts = [part.tolist() for step in steps for part in step.values]
    assert parts == batches + [[]] * (len(steps) * count - len(batches))
    assert len(steps) == -(-len(batches) // count)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_state_of_per_replica_batches_resumes_on_another_number_of_replicas(sequential):
    source = Dataset.from_iterable(lambda: iter(range(20))) if sequential else Dataset.range(20)
    first = iter(dealt(source.batch(2), 3))
    next(first)
    again = iter(dealt(source.batch(2), 2))
    again.load_state_dict(first.state_dict())
    rest = [x for step in again for part in step.values for x in part.tolist()]
    assert rest == [*range(6, 20)]


def test_an_error_within_a_step_of_per_replica_batches_loses_nothing():
    failing = iter([True])

    def broken(x):
        if x == 4 and next(failing, False):
            raise ZeroDivisionError
        return x

    for source in (Dataset.range(9), Dataset.from_iterable(lambda: iter(range(9)))):
        failing = iter([True])
        iterator = iter(dealt(source.map(broken).batch(1), 3))
        assert [part.tolist() for part in next(iterator).values] == [[0], [1], [2]]
        with pytest.raises(ZeroDivisionError):
            next(iterator)
        assert [part.tolist() for part in next(iterator).values] == [[3], [4], [5]]


def test_unbatched_elements_must_fill_a_step():
    assert [int(x) for step in dealt(Dataset.range(4), 2) for x in step.values] == [0, 1, 2, 3]
    iterator = iter(dealt(Dataset.range(3), 2))
    next(iterator)
    with pytest.raises(DatasetError, match="1 elements for 2 replicas"):
        next(iterator)


def test_element_spec_returns_shapes_and_keeps_the_position():
    data = Dataset.from_arrays({"x": np.zeros((5, 3), np.float32), "y": np.arange(5)}).batch(2)
    distributed = DistributedDataset(data, 2)
    iterator = iter(distributed)
    next(iterator)
    spec = iterator.element_spec
    assert spec["x"].values == (((None, 3), np.float32),) * 2
    assert spec["y"].on(1) == ((None,), np.int64)
    assert distributed.element_spec["x"].values == spec["x"].values
    assert next(iterator)["y"].on(0).tolist() == [2]
    with pytest.raises(DatasetError, match="empty"):
        _ = DistributedDataset(data.take(0), 2).element_spec
