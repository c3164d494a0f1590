import itertools
import multiprocessing
import queue
import threading
import time

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.options import InputOptions
from dvkernels.errors import DatasetError


def filled(*values):
    source = queue.Queue()
    for value in values:
        source.put(value)
    return source


def test_elements_are_delivered_until_the_end_element():
    assert list(Dataset.from_live(filled(1, 2, 3, None))) == [1, 2, 3]
    assert list(Dataset.from_live(filled(1, None, "over"), end="over")) == [1, None]
    values = iter([4, 5])
    assert list(Dataset.from_live(lambda timeout: next(values))) == [4, 5]


def test_transforms_apply_to_live_sources():
    dataset = Dataset.from_live(filled(*range(10), None)).filter(lambda x: x % 2).map(np.int64)
    assert [b.tolist() for b in dataset.batch(2)] == [[1, 3], [5, 7], [9]]


@pytest.mark.skipif(not hasattr(queue, "ShutDown"), reason="queues are shut down since 3.13")
def test_a_queue_that_is_shut_down_ends_the_stream():
    source = filled(1, 2)
    source.shutdown()
    assert list(Dataset.from_live(source)) == [1, 2]


def test_a_multiprocessing_queue_is_accepted():
    source = multiprocessing.get_context("spawn").Queue()
    for value in (1, 2, None):
        source.put(value)
    assert list(Dataset.from_live(source)) == [1, 2]
    source.close()
    source.join_thread()


def test_a_batch_is_delivered_when_it_is_full():
    dataset = Dataset.from_live(filled(*range(5), None), batch_size=2)
    assert [b.tolist() for b in dataset] == [[0, 1], [2, 3], [4]]


def test_an_incomplete_batch_is_delivered_after_max_wait_seconds():
    source = filled(1, 2)
    iterator = iter(Dataset.from_live(source, batch_size=100, max_wait_seconds=0.2))
    start = time.monotonic()
    assert next(iterator).tolist() == [1, 2]
    assert 0.15 <= time.monotonic() - start < 5
    timer = threading.Timer(0.3, lambda: [source.put(3), source.put(None)])
    timer.start()
    assert next(iterator).tolist() == [3]  # no batch is empty: it waited for the first element
    assert list(iterator) == []
    timer.join()


def test_elements_that_have_arrived_by_the_deadline_are_included():
    iterator = iter(Dataset.from_live(filled(1, 2, 3), batch_size=9, max_wait_seconds=0))
    assert next(iterator).tolist() == [1, 2, 3]


def test_a_batch_is_split_over_the_replicas():
    distributed = DistributedDataset(Dataset.from_live(filled(*range(5), None), batch_size=3), 2)
    assert [[p.tolist() for p in b.values] for b in distributed] == [[[0, 1], [2]], [[3], [4]]]


def test_an_epoch_continues_where_the_last_one_stopped():
    dataset = Dataset.from_live(filled(*range(4), None))
    assert list(itertools.islice(dataset, 2)) == [0, 1]
    assert list(dataset) == [2, 3]
    assert list(dataset) == []


def test_a_failed_transform_loses_nothing():
    fails = [True]

    def shaky(x):
        if fails and x[0] == 2:
            fails.clear()
            raise ArithmeticError("once")
        return x

    iterator = iter(Dataset.from_live(filled(*range(6), None), batch_size=2).map(shaky))
    assert next(iterator).tolist() == [0, 1]
    with pytest.raises(ArithmeticError, match="once"):
        next(iterator)
    assert [b.tolist() for b in iterator] == [[2, 3], [4, 5]]


def test_a_failed_producer_loses_nothing():
    answers = iter([1, OSError("cable"), 2, None])

    def get(timeout):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    iterator = iter(Dataset.from_live(get, batch_size=2))
    with pytest.raises(OSError, match="cable") as caught:
        next(iterator)
    assert "from_live" in caught.value.__notes__[0]
    assert next(iterator).tolist() == [1, 2]


def test_element_spec_loses_no_element():
    distributed = DistributedDataset(Dataset.from_live(filled(*range(6), None), batch_size=2), 1)
    assert distributed.element_spec.values[0].shape == (None,)
    iterator = iter(distributed)
    assert iterator.element_spec.values[0].shape == (None,)
    assert [b.values[0].tolist() for b in iterator] == [[0, 1], [2, 3], [4, 5]]


def test_one_iterator_reads_at_a_time():
    dataset = Dataset.from_live(filled(*range(6), None))
    first, second = iter(dataset), iter(dataset)
    assert [next(first), next(second)] == [0, 1]
    for _ in range(2):
        with pytest.raises(DatasetError, match="a newer one has taken over"):
            next(first)
    assert list(second) == [2, 3, 4, 5]


def test_resuming_is_refused_with_the_reason():
    distributed = DistributedDataset(Dataset.from_live(filled(1, None), batch_size=1).map(abs), 1)
    iterator = iter(distributed)
    next(iterator)
    with pytest.raises(DatasetError, match=r"state_dict: .* cannot be delivered again"):
        iterator.state_dict()
    with pytest.raises(DatasetError, match=r"load_state_dict: .* read them with from_files"):
        iterator.load_state_dict({})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": 3}, "expected a queue, or a function"),
        ({"source": {}}, "expected a queue, or a function"),
        ({"source": queue.Queue}, "expected a queue, or a function"),
        ({"batch_size": 0}, "leave it out for single elements"),
        ({"max_wait_seconds": 1}, "expected batch_size with max_wait_seconds=1"),
        ({"batch_size": 2, "max_wait_seconds": -1}, "a number of at least 0; got -1"),
        ({"batch_size": 2, "max_wait_seconds": "1"}, "a number of at least 0; got '1'"),
        ({"batch_size": 2, "max_wait_seconds": float("nan")}, "a number of at least 0; got nan"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(DatasetError, match=words):
        Dataset.from_live(**{"source": queue.Queue(), **arguments})


def test_live_sources_are_not_prefetched():
    dataset = Dataset.from_live(filled(*range(6), None), batch_size=2).prefetch(2)
    iterator = iter(DistributedDataset(dataset, 1, options=InputOptions(prefetch=3)))
    assert next(iterator).values[0].tolist() == [0, 1]
    iterator.close()
    assert [b.tolist() for b in dataset] == [[2, 3], [4, 5]]
