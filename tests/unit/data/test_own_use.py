"""A dataset used by its own functions works or raises; it never deadlocks."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.file_source import MAX_OPEN_FILES
from dvkernels.errors import DatasetError


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_map_function_may_iterate_its_own_dataset(sequential, depth):
    shared = []

    def fn(x):  # each element from 8 on is computed from the first four
        return x if x < 8 else x + sum(next(iter(shared[0].batch(4).prefetch(depth))).tolist())

    source = Dataset.from_iterable(lambda: iter(range(16))) if sequential else Dataset.range(16)
    shared.append(source.map(fn, num_workers=2))
    assert [int(x) for batch in shared[0].batch(4) for x in batch] == [
        *range(8),
        *(x + 6 for x in range(8, 16)),
    ]


def test_the_caller_runs_tasks_that_no_thread_has_begun():
    may_go = threading.Event()
    first = []

    def fn(x):
        if not first:  # the one thread is busy until all other elements are done
            first.append(x)
            may_go.wait(60)
        elif x == 7:
            may_go.set()
        return x

    data = Dataset.from_iterable(lambda: iter(range(8))).map(fn, num_workers=1)
    outer, inner = iter(data.batch(2)), iter(Dataset.range(8).map(fn, num_workers=1).batch(8))
    shared = data.node._workers  # both use the same thread
    inner._shared_node.source._workers = shared
    thread = threading.Thread(target=next, args=[outer])
    thread.start()
    while not first:
        pass
    assert next(inner).tolist() == [*range(8)]
    thread.join()
    outer.close()
    inner.close()


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / f"{k}.npy" for k in range(MAX_OPEN_FILES + 4)]
    for k, path in enumerate(found):
        np.save(path, np.arange(3) + 10 * k)
    return found


def test_a_reader_may_read_other_files_of_its_own_dataset(paths):
    shared = []

    def reader(path):
        array = np.load(path)
        if not (shared and array[0]):
            return array
        return array - shared[0].node.element(3 * len(paths) - 1, 0)

    shared.append(Dataset.from_files(paths, reader, random_access=True))
    shifted = Dataset.from_files(paths, reader, random_access=True)
    last = 10 * (len(paths) - 1) + 2
    assert [int(x) for x in shifted][:6] == [0, 1, 2, 10 - last, 11 - last, 12 - last]


def test_a_reader_that_needs_the_file_it_opens_is_refused(paths):
    shared = []

    def reader(path):
        if shared:
            shared[0].node.element(0, 0)
        return np.load(path)

    dataset = Dataset.from_files(paths, reader, random_access=True)
    shared.append(dataset)
    with pytest.raises(DatasetError, match=r"reader that does not use the file"):
        next(iter(dataset))  # reads the first file, which is no longer open
    shared.clear()
    assert len(list(dataset)) == 3 * len(paths)


def test_files_are_opened_by_several_threads_at_once(paths):
    together = threading.Barrier(2, timeout=60)

    def reader(path):
        if shared:
            together.wait()
        return np.load(path)

    shared = []
    shared.append(Dataset.from_files(paths, reader, random_access=True))
    found = []
    threads = [
        threading.Thread(target=lambda k=k: found.append(shared[0].node.element(k, 0)))
        for k in (0, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 10]
