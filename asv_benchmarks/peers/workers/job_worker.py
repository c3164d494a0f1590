"""Worker that all-reduces between the processes of a job: by this library, and by their MPI.

Started under mpiexec in an environment that has dvkernels. A command names the ``implementation``:

* ``mpi``: ``Allreduce``;
* ``ours``: our communicator between workers;
* ``symmetric``: the same, of arrays in symmetric memory;
* ``replicas``: the first half of the processes, with two replicas each;
* ``strategy``: ``strategy.reduce`` of a scalar;
* ``gradients``: the mean of a ResNet-50's gradients, 161 arrays, as a strategy computes it;
* ``symmetric gradients``: the same, in place, of arrays in symmetric memory;
* ``fused``: the same by MPI, with a fusion buffer.

Arrays are reduced in place and out of place; the shorter time counts.
"""

from __future__ import annotations

import functools
import itertools
import math

import mpi_commands
import numpy as np
import protocol
from mpi4py import MPI

from dvkernels.benchmarks import gradients
from dvkernels.communicators import registry, single
from dvkernels.communicators.workers import connect
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.reduce_op import ReduceOp
from dvkernels.strategies.multi_worker_mirrored import MultiWorkerMirroredStrategy
from dvkernels.verbs import all_reduce_each

TIMEOUT_SECONDS = 60.0
BYTES_PER_BUCKET = 4 * 1024 * 1024
MEAN = ReduceOp.MEAN

comm = MPI.COMM_WORLD
strategy = MultiWorkerMirroredStrategy(devices=["cpu:0"], timeout_seconds=TIMEOUT_SECONDS)
workers = registry.between_workers(strategy.cluster_resolver, TIMEOUT_SECONDS)
half = comm.Split(int(comm.rank >= comm.size // 2), comm.rank)


@functools.cache
def replicas():
    """Return the communicator of two replicas in each process of this half of the job."""
    group = WorkerGroup(connect.over_shared_memory(half, TIMEOUT_SECONDS))
    inside = registry.between_devices(strategy.worker_devices * 2, "auto")
    return registry.between_replicas(inside, group, [2] * half.size)


def seconds_of(call, group, renew, iterations):
    """Return the seconds per call on the slowest rank; each portion has an untimed call first."""
    elapsed = 0.0
    for portion in protocol.portions(iterations, comm.size):
        renew()
        call()
        group.Barrier()
        started = MPI.Wtime()
        for _ in range(portion):
            call()
        elapsed += MPI.Wtime() - started
    return group.allreduce(elapsed / iterations, op=MPI.MAX)


def private_empty(shape, dtype):
    """Return a new array in private memory."""
    return np.empty(shape, dtype)


def symmetric_empty(shape, dtype):
    """Return a new array in symmetric memory."""
    return workers.empty(shape, np.dtype(dtype), 1)[0]


def measure_all_reduce(reduce_into, count, dtype, own, group, iterations, empty=private_empty):
    """Return seconds, wrong elements and a note of ``reduce_into(targets, sources)``.

    ``own`` are the ranks whose arrays this process contributes; ``empty`` allocates them.
    """
    every = protocol.inputs(count, comm.size, dtype)
    expected = np.sum(every, axis=0, dtype=dtype)
    sources = [empty((count,), dtype) for _ in own]
    targets = [empty((count,), dtype) for _ in own]
    for source, rank in zip(sources, own, strict=True):
        source[:] = every[rank]
    del every
    reduce_into(targets, sources)
    wrong = sum(int((target != expected).sum()) for target in targets)
    reduce_into(sources, sources)
    wrong += sum(int((source != expected).sum()) for source in sources)
    steady = [protocol.steady(count, comm.size, dtype)[rank] for rank in own]

    def renew():
        for arrays in (sources, targets):
            for array, values in zip(arrays, steady, strict=True):
                array[:] = values

    def seconds_from(inputs):
        return seconds_of(lambda: reduce_into(targets, inputs), group, renew, iterations)

    out_of_place, in_place = seconds_from(sources), seconds_from(targets)
    note = "in place" if in_place <= out_of_place else "out of place"
    return min(in_place, out_of_place), group.allreduce(wrong), note


def measure_gradients(implementation, iterations):
    """Return seconds, wrong elements and a note of the mean of one step's gradients."""
    every = [
        protocol.inputs(math.prod(shape), comm.size, "float32")
        for shape in gradients.resnet_50_shapes()
    ]
    mine = [arrays[comm.rank] for arrays in every]
    whole = registry.between_replicas(single.Single(), workers, [1] * comm.size, BYTES_PER_BUCKET)
    fusion_buffer = np.empty(sum(array.size for array in mine), np.float32)
    symmetric = []
    if implementation == "symmetric gradients":
        symmetric = [[symmetric_empty(array.shape, array.dtype)] for array in mine]

    def ours():
        return [mean for (mean,) in all_reduce_each(whole, [[array] for array in mine], MEAN)]

    def renew():
        for (array,), values in zip(symmetric, mine, strict=bool(symmetric)):
            array[:] = values

    def in_place():
        return [mean for (mean,) in all_reduce_each(whole, symmetric, MEAN, symmetric)]

    def by_mpi():
        np.concatenate(mine, out=fusion_buffer)
        comm.Allreduce(MPI.IN_PLACE, fusion_buffer, op=MPI.SUM)
        np.divide(fusion_buffer, comm.size, out=fusion_buffer)
        ends = itertools.accumulate((array.size for array in mine), initial=0)
        return [fusion_buffer[start:stop].copy() for start, stop in itertools.pairwise(ends)]

    calls = {"gradients": ours, "symmetric gradients": in_place, "fused": by_mpi}
    call = calls[implementation]
    renew()
    wrong = sum(
        int((found != np.mean(arrays, axis=0)).sum())
        for found, arrays in zip(call(), every, strict=True)
    )
    return seconds_of(call, comm, renew, iterations), comm.allreduce(wrong), ""


def mpi_reduce_into(targets, sources):
    """Sum one array per process by MPI."""
    (target,), (source,) = targets, sources
    comm.Allreduce(MPI.IN_PLACE if source is target else source, target, op=MPI.SUM)


def our_reduce_into(targets, sources):
    """Sum one array per process by our communicator."""
    workers.all_reduce(sources, ReduceOp.SUM, targets)


def measure(implementation, count, dtype, iterations):
    """Return seconds, wrong elements and a note of one implementation."""
    if implementation == "strategy":
        number = strategy.run(lambda: np.float64(comm.rank))
        expected = comm.size * (comm.size - 1) / 2
        wrong = int(strategy.reduce("sum", number) != expected)

        def reduce():
            strategy.reduce("sum", number)

        return seconds_of(reduce, comm, lambda: None, iterations), comm.allreduce(wrong), ""
    if implementation in ("gradients", "symmetric gradients", "fused"):
        return measure_gradients(implementation, iterations)
    if implementation == "replicas":
        if comm.rank >= half.size:
            return 0.0, 0, ""
        two_levels = replicas()
        own = [2 * half.rank, 2 * half.rank + 1]
        return measure_all_reduce(
            lambda targets, sources: two_levels.all_reduce(sources, ReduceOp.SUM, targets),
            count, dtype, own, half, iterations,
        )  # fmt: skip
    call, empty = {
        "mpi": (mpi_reduce_into, private_empty),
        "ours": (our_reduce_into, private_empty),
        "symmetric": (our_reduce_into, symmetric_empty),
    }[implementation]
    return measure_all_reduce(call, count, dtype, [comm.rank], comm, iterations, empty)


answer = protocol.claim_stdout()
for command in mpi_commands.each(comm, protocol.commands()):
    seconds, wrong, note = measure(**command)
    if comm.rank == 0:
        answer(seconds=seconds, wrong=wrong, note=note)
