"""One thread at a time uses an iterator, in spite of errors, timeouts, forks and closing."""

from __future__ import annotations

import collections
import os
import queue
import sys
import threading

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.errors import DatasetError

DATASETS = {
    "random access": lambda: Dataset.range(2000).batch(4),
    "sequential": lambda: Dataset.from_iterable(lambda: iter(range(2000))).batch(4),
    "filtered": lambda: Dataset.range(2000).filter(lambda x: True).batch(4),
    "prefetched": lambda: Dataset.range(2000).batch(4).prefetch(3),
    "threads": lambda: Dataset.range(2000).map(abs, num_workers=2).batch(4),
    "live": lambda: Dataset.from_live(filled(2000), batch_size=4),
}


def filled(count):
    iterators = queue.SimpleQueue()
    for k in [*range(count), None]:
        iterators.put(k)
    return iterators


@pytest.fixture(autouse=True)
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("is_distributed", [False, True])
def test_threads_that_share_an_iterator_get_each_element_once(kind, is_distributed):
    dataset = DATASETS[kind]()
    iterator = iter(DistributedDataset(dataset, 2) if is_distributed else dataset)
    found = queue.SimpleQueue()

    def work():
        for batch in iterator:
            found.put(np.concatenate(batch.values) if is_distributed else batch)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    iterator.close()
    numbers = [int(x) for _ in range(found.qsize()) for x in found.get()]
    assert collections.Counter(numbers) == collections.Counter(range(2000))


def test_a_state_saved_while_another_thread_reads_is_that_of_a_whole_batch():
    data = Dataset.range(600).shuffle(seed=1).batch(3)
    iterator, whole = iter(DistributedDataset(data, 2)), iter(DistributedDataset(data, 2))
    right = [np.concatenate(batch.values).tolist() for batch in whole]
    thread = threading.Thread(target=collections.deque, args=(iterator, 0))
    thread.start()
    while thread.is_alive():
        state = iterator.state_dict()
        resumed = iter(DistributedDataset(data, 2))
        resumed.load_state_dict(state)
        rest = [
            np.concatenate(batch.values).tolist() for batch, _ in zip(resumed, "ab", strict=False)
        ]
        assert rest == right[state["position"] :][:2]
    thread.join()


def test_the_mutex_is_released_after_an_error_and_after_a_timeout(monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.05")
    mutex, is_in, may_go = MutualExclusion(), threading.Event(), threading.Event()
    with pytest.raises(ZeroDivisionError):
        mutex.run(lambda: 1 / 0)
    thread = threading.Thread(target=mutex.run, args=[lambda: is_in.set() or may_go.wait(60)])
    thread.start()
    is_in.wait(60)
    with pytest.raises(DatasetError, match="DVKERNELS_TIMEOUT_SECONDS"):
        mutex.run(lambda: 1)
    asked = []
    mutex.close(lambda: asked.append("end"), lambda: asked.append("stop") or may_go.set())
    assert asked[0] == "stop"
    assert asked[-1] == "end"
    thread.join()
    assert mutex.run(lambda: 2) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_used_by_its_own_map_function_raises(workers):
    iterators = []
    data = Dataset.range(10).map(lambda x: next(iterators[0]) if x == 4 else x, num_workers=workers)
    iterators.append(iter(data.batch(2)))
    assert next(iterators[0]).tolist() == [0, 1]
    assert next(iterators[0]).tolist() == [2, 3]
    if workers == 0:
        with pytest.raises(DatasetError, match="is not in use"):
            next(iterators[0])


def test_a_fork_does_not_wait_for_the_threads_of_its_parent():
    mutex, is_in, may_go = MutualExclusion(), threading.Event(), threading.Event()
    thread = threading.Thread(target=mutex.run, args=[lambda: is_in.set() or may_go.wait(60)])
    thread.start()
    is_in.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(mutex.run(lambda: 5))
    may_go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


@pytest.mark.parametrize("is_distributed", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        lambda: Dataset.from_live(queue.Queue(), batch_size=2),
        lambda: Dataset.from_live(queue.Queue()).filter(bool).batch(2),
    ],
)
def test_closing_wakes_a_waiting_thread(data, is_distributed):
    iterator = iter(DistributedDataset(data(), 1) if is_distributed else data())
    outcome = queue.SimpleQueue()

    def work():
        try:
            outcome.put(next(iterator))
        except Exception as error:
            outcome.put(error)

    thread = threading.Thread(target=work)
    thread.start()
    with pytest.raises(queue.Empty):
        outcome.get(timeout=0.05)  # it waits
    iterator.close()
    thread.join(10)
    with pytest.raises(DatasetError, match="expected an open iterator"):
        raise outcome.get(timeout=0)


def test_closing_wakes_a_thread_that_waits_for_the_prefetch_thread():
    is_in, may_go = threading.Event(), threading.Event()
    data = Dataset.range(9).map(lambda x: is_in.set() or (may_go.wait(60) and x)).prefetch(1)
    iterator = iter(DistributedDataset(data.batch(1), 1))
    outcome = queue.SimpleQueue()

    def work():
        try:
            outcome.put(next(iterator))
        except Exception as error:
            outcome.put(error)

    thread = threading.Thread(target=work)
    thread.start()
    is_in.wait(60)
    closing = threading.Thread(target=iterator.close)
    closing.start()
    with pytest.raises(DatasetError, match="expected an open iterator"):
        raise outcome.get(timeout=4)
    may_go.set()
    thread.join()
    closing.join()
