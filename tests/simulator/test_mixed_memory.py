"""Workers whose values lie in different kinds of memory: some on a GPU, some on the host."""

from __future__ import annotations

import functools
import itertools
import os

import ml_dtypes
import numpy as np
import pytest
from threads_as_workers import results, transports

import dvkernels as dv
from dvkernels.communicators import registry
from dvkernels.communicators.bucketing import Bucketing
from dvkernels.communicators.hierarchical import Hierarchical
from dvkernels.communicators.local import Local
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.devices import array_memory
from dvkernels.verbs import all_reduce_each

pytestmark = pytest.mark.skipif(
    os.environ.get("NUMBA_ENABLE_CUDASIM") != "1", reason="needs the simulator"
)
COUNTS = pytest.mark.parametrize("counts", [[1, 1], [2, 1], [1, 2], [2, 2]])


def put(value, on_gpu):
    return array_memory.gpu().new(np.asarray(value), dv.Device("cuda", 0)) if on_gpu else value


def on_host(value):
    return array_memory.holding(value).to_host(value)


def is_on_gpu(value):
    return not isinstance(value, np.ndarray)


def communicators(counts, are_on_gpus, bytes_per_bucket=1 << 20):
    """Return the communicator of each worker; ``are_on_gpus`` says which workers have GPUs."""
    workers = [WorkerGroup(transport) for transport in transports(len(counts), 5.0)]
    workers = results(
        *(
            lambda one=one, where=where: registry.for_any_memory(one, where)
            for one, where in zip(workers, are_on_gpus, strict=True)
        )
    )
    return [
        Bucketing(Hierarchical(Local(count, "auto"), worker, counts), bytes_per_bucket)
        for count, worker in zip(counts, workers, strict=True)
    ]


# The leaves of a pytree: dtype, length, and the workers on which they lie on a GPU.
NESTS = [
    [("f4", 3, (True, False)), ("f4", 5, (True, False))],
    [("f4", 3, (True, False)), ("f4", 5, (False, False))],
    [("f4", 3, (True, False)), ("f4", 5, (False, True)), ("f4", 0, (True, True))],
    [("f8", 4, (False, False)), ("f4", 3, (True, False)), ("f8", 2, (False, True))],
    [("f4", 3, (True, True)), ("f2", 5, (False, True))],
    [("f8", 4, (False, False)), ("f4", 3, (False, False))],
]


@COUNTS
@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("op", [dv.ReduceOp.MEAN, dv.ReduceOp.SUM, dv.ReduceOp.MAX])
@pytest.mark.parametrize("bytes_per_bucket", [12, 1 << 20])
def test_a_pytree_is_reduced_once_whatever_memory_its_arrays_have(
    counts, nest, op, bytes_per_bucket, monkeypatch
):
    sizes = []

    def recording(self, columns, *rest, of=WorkerGroup.all_reduce):
        sizes.append((self.rank, columns[0].size))
        return of(self, columns, *rest)

    monkeypatch.setattr(WorkerGroup, "all_reduce", recording)
    size, starts = sum(counts), [0, counts[0]]
    by_rank = [[np.arange(n, dtype=dtype) + k + rank for k, (dtype, n, _) in enumerate(nest)]
             for rank in range(size)]  # fmt: skip

    def call(communicator, worker):
        columns = [
            [put(by_rank[starts[worker] + k][c], where[worker]) for k in range(counts[worker])]
            for c, (_, _, where) in enumerate(nest)
        ]
        found = all_reduce_each(communicator, columns, op)
        for column, reduced in zip(columns, found, strict=True):
            assert [*map(is_on_gpu, reduced)] == [*map(is_on_gpu, column)]
        return [[on_host(array) for array in column] for column in found]

    made = communicators(counts, (True, False), bytes_per_bucket)
    found = results(*(lambda c=c, w=w: call(c, w) for w, c in enumerate(made)))
    combine = {"MEAN": np.mean, "SUM": np.sum, "MAX": np.max}[op.name]
    for of_worker, (c, (dtype, _, _)) in itertools.product(found, enumerate(nest)):
        right = combine([of_rank[c] for of_rank in by_rank], axis=0).astype(dtype)
        for array in of_worker[c]:
            assert array.dtype == right.dtype
            np.testing.assert_allclose(array.astype("f8"), right.astype("f8"), rtol=1e-3)
    for worker in range(2):
        assert sum(n for rank, n in sizes if rank == worker) == sum(n for _, n, _ in nest)


@COUNTS
@pytest.mark.parametrize("dtype", ["f4", "f2", ml_dtypes.bfloat16, "c8", "i4"])
@pytest.mark.parametrize("verb", ["all_reduce", "reduce", "reduce_scatter"])
def test_single_values_in_mixed_memory(counts, dtype, verb):
    op = dv.ReduceOp.SUM if dtype == "i4" else dv.ReduceOp.MEAN
    calls = []
    for worker, communicator in enumerate(communicators(counts, (True, False))):
        values = [put(np.ones((3, 2), dtype), worker == 0)] * counts[worker]
        calls.append(functools.partial(getattr(communicator, verb), values, op))
    for worker, found in enumerate(results(*calls)):
        for one in found if verb != "reduce" else [found]:
            assert is_on_gpu(one) == (worker == 0)
            assert (on_host(one) == (sum(counts) if dtype == "i4" else 1)).all()


def test_worker_groups_without_gpus_are_returned_unchanged():
    workers = [WorkerGroup(transport) for transport in transports(2)]
    found = results(*(lambda one=one: registry.for_any_memory(one, False) for one in workers))
    assert all(one is given for one, given in zip(found, workers, strict=True))
