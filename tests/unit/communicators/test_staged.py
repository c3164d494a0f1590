"""GPU arrays are staged in pinned memory, which is not overwritten before it has been read."""

from __future__ import annotations

import functools
import itertools

import numba
import numpy as np
import pytest
from gpu_double import Arrays, OnDevice
from threads_as_workers import at_once, results, transports

from dvkernels.communicators.base import Workers
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.communicators.workers.staged import Staged
from dvkernels.custom_reduction import CustomReduction
from dvkernels.reduce_op import ReduceOp

MY_SUM = CustomReduction(numba.njit(lambda a, b: a + b), 0, "my sum")


def on_device(content):
    return OnDevice(np.array(content))


@pytest.mark.parametrize("seed", range(20))
def test_later_work_does_not_disturb_a_pending_upload(seed):
    arrays = [Arrays(seed), Arrays(seed + 100)]
    workers = [
        Staged(WorkerGroup(wire), seam) for wire, seam in zip(transports(2), arrays, strict=True)
    ]
    assert all(isinstance(worker, Workers) for worker in workers)

    def sums(worker):
        for turn, size in enumerate((3, 9, 2, 9)):
            arrays[worker.rank].stream = arrays[worker.rank].streams[turn % 2]
            value = on_device(np.full(size, size + worker.rank))
            yield worker.all_reduce([value], ReduceOp.SUM)[0]

    def call(worker):
        rank = worker.rank
        return [
            *sums(worker),
            worker.reduce_scatter([on_device(np.arange(3) + rank)], ReduceOp.MAX)[0],
            worker.all_gather([on_device(np.full((rank + 1, 2), rank))], 0)[0],
            worker.broadcast([on_device([rank, 7])], 1)[0],
        ]  # fmt: skip

    for rank, found in enumerate(at_once(*(lambda w=w: call(w) for w in workers))):
        arrays[rank].drain()
        right = [np.full(size, 2 * size + 1) for size in (3, 9, 2, 9)]
        right += [np.array([1, 2] if rank == 0 else [3]), np.array([[0, 0], [1, 1], [1, 1]])]
        for one, wanted in zip(found, [*right, np.array([1, 7])], strict=True):
            np.testing.assert_array_equal(one.hidden, wanted)
        assert arrays[rank].num_pinned == 2, "pinned memory is kept, and grew once"


def test_host_arrays_are_not_staged():
    seams = [Arrays(0), Arrays(1)]
    workers = [Staged(WorkerGroup(w), seam) for w, seam in zip(transports(2), seams, strict=True)]
    found = at_once(*(lambda w=w: w.reduce([np.ones(3)], ReduceOp.SUM) for w in workers))
    assert [one.tolist() for one in found] == [[2.0] * 3] * 2
    beside = [worker.duplicate() for worker in workers]
    assert at_once(*(lambda w=w: w.exchange(w.rank) for w in beside)) == [[0, 1]] * 2
    assert all(seam.num_pinned == 0 for seam in seams)


@pytest.mark.parametrize("where", list(itertools.product([True, False], repeat=3)))
def test_each_worker_gets_results_in_the_memory_of_its_value(where):
    """``where`` says which workers have their values on a GPU."""
    seams = [Arrays(rank) for rank in range(3)]
    put = lambda array, rank: OnDevice(array) if where[rank] else array  # noqa: E731

    def call(worker):
        rank = worker.rank
        found = [
            worker.all_reduce([put(np.full(5, rank + 1.0), rank)], ReduceOp.MEAN)[0],
            worker.all_reduce([put(np.full(5, rank + 1.0), rank)], MY_SUM)[0],
            worker.reduce_scatter([put(np.full(5, rank + 1), rank)], ReduceOp.SUM)[0],
            worker.all_gather([put(np.full((rank, 2), rank), rank)], 0)[0],
            worker.broadcast([put(np.full(3, rank), rank)], 1)[0],
        ]
        seams[rank].drain()
        assert all(isinstance(one, OnDevice) == where[rank] for one in found)
        return [getattr(one, "hidden", one).tolist() for one in found]

    workers = [Staged(WorkerGroup(w), seam) for w, seam in zip(transports(3), seams, strict=True)]
    for rank, found in enumerate(results(*(functools.partial(call, w) for w in workers))):
        rows = [[1, 1], [2, 2], [2, 2]]
        assert found == [[2.0] * 5, [6.0] * 5, [6] * (2, 2, 1)[rank], rows, [1] * 3]
