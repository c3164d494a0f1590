"""All-reduce between the processes of a job: ours, and that of the MPI that started them.

Started under mpiexec in an environment that has dvkernels. A command says ``who`` is measured:

* ``mpi``: ``Allreduce``;
* ``ours``: the communicator between workers;
* ``window``: the same, of arrays in memory that the processes share;
* ``replicas``: the first half of the processes, with two replicas each;
* ``strategy``: ``strategy.reduce`` of a number;
* ``gradients``: the mean of a ResNet-50's gradients, 161 arrays, as a strategy takes it;
* ``kept gradients``: the same, in place, of arrays in memory that the processes share;
* ``fused``: the same by MPI, through a buffer that they are packed into and unpacked from.

Arrays are reduced in place and out of place; the better of both counts.
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
from dvkernels.communicators.bucketing import all_reduce_each
from dvkernels.communicators.workers import connect
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.reduce_op import ReduceOp
from dvkernels.strategies.multi_worker_mirrored import MultiWorkerMirroredStrategy

TIMEOUT_SECONDS = 60.0
BYTES_PER_BUCKET = 4 * 1024 * 1024  # where there are buckets
MEAN = ReduceOp.MEAN

comm = MPI.COMM_WORLD
strategy = MultiWorkerMirroredStrategy(devices=["cpu:0"], timeout_seconds=TIMEOUT_SECONDS)
workers = registry.between_workers(strategy.cluster_resolver, TIMEOUT_SECONDS)
half = comm.Split(int(comm.rank >= comm.size // 2), comm.rank)


@functools.cache
def replicas():
    """Return the communicator of two replicas in each process of this half."""
    group = WorkerGroup(connect.over_shared_memory(half, TIMEOUT_SECONDS))
    inside = registry.between_devices(strategy.worker_devices * 2, "auto")
    return registry.between_replicas(inside, group, [2] * half.size)


def seconds_of(call, group, renew, iterations):
    """Return the seconds that one call takes, on the slowest rank; of each portion one more."""
    elapsed = 0.0
    for portion in protocol.portions(iterations, comm.size):
        renew()
        call()
        group.Barrier()
        began = MPI.Wtime()
        for _ in range(portion):
            call()
        elapsed += MPI.Wtime() - began
    return group.allreduce(elapsed / iterations, op=MPI.MAX)


def plain(shape, dtype):
    """Return a new array that only this process sees."""
    return np.empty(shape, dtype)


def shared(shape, dtype):
    """Return a new array in memory that all processes see."""
    return workers.empty(shape, np.dtype(dtype), 1)[0]


def in_place_and_apart(reduce_into, count, dtype, own, group, iterations, new=plain):
    """Return seconds, wrong elements and a note of ``reduce_into(targets, sources)``.

    ``own`` is the ranks whose arrays this process brings; ``new`` makes arrays.
    """
    every = protocol.inputs(count, comm.size, dtype)
    expected = np.sum(every, axis=0, dtype=dtype)
    sources = [new((count,), dtype) for _ in own]
    targets = [new((count,), dtype) for _ in own]
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
            for array, given in zip(arrays, steady, strict=True):
                array[:] = given

    def measured(given):
        return seconds_of(lambda: reduce_into(targets, given), group, renew, iterations)

    apart, in_place = measured(sources), measured(targets)
    note = "in place" if in_place <= apart else "out of place"
    return min(in_place, apart), group.allreduce(wrong), note


def mean_of_gradients(who, iterations):
    """Return seconds, wrong elements and a note of one step's gradients."""
    every = [
        protocol.inputs(math.prod(shape), comm.size, "float32")
        for shape in gradients.resnet_50_shapes()
    ]
    mine = [arrays[comm.rank] for arrays in every]
    whole = registry.between_replicas(single.Single(), workers, [1] * comm.size, BYTES_PER_BUCKET)
    held = np.empty(sum(array.size for array in mine), np.float32)

    def ours():
        return [one for (one,) in all_reduce_each(whole, [[array] for array in mine], MEAN)]

    kept = [[shared(array.shape, array.dtype)] for array in mine] if who == "kept gradients" else []

    def renew():
        for (array,), given in zip(kept, mine, strict=bool(kept)):
            array[:] = given

    def in_place():
        return [one for (one,) in all_reduce_each(whole, kept, MEAN, kept)]

    def by_mpi():
        np.concatenate(mine, out=held)
        comm.Allreduce(MPI.IN_PLACE, held, op=MPI.SUM)
        np.divide(held, comm.size, out=held)
        ends = itertools.accumulate((array.size for array in mine), initial=0)
        return [held[start:stop].copy() for start, stop in itertools.pairwise(ends)]

    call = {"gradients": ours, "kept gradients": in_place, "fused": by_mpi}[who]
    renew()
    wrong = sum(
        int((found != np.mean(arrays, axis=0)).sum())
        for found, arrays in zip(call(), every, strict=True)
    )
    return seconds_of(call, comm, renew, iterations), comm.allreduce(wrong), ""


def mpi_reduce_into(targets, sources):
    """Reduce by MPI."""
    (target,), (source,) = targets, sources
    comm.Allreduce(MPI.IN_PLACE if source is target else source, target, op=MPI.SUM)


def measure(who, count, dtype, iterations):
    """Return seconds, wrong elements and a note."""
    if who == "strategy":
        number = strategy.run(lambda: np.float64(comm.rank))
        expected = comm.size * (comm.size - 1) / 2
        wrong = int(strategy.reduce("sum", number) != expected)

        def reduce():
            strategy.reduce("sum", number)

        return seconds_of(reduce, comm, lambda: None, iterations), comm.allreduce(wrong), ""
    if who in ("gradients", "kept gradients", "fused"):
        return mean_of_gradients(who, iterations)
    if who == "replicas":
        if comm.rank >= half.size:
            return 0.0, 0, ""
        both = replicas()
        own = [2 * half.rank, 2 * half.rank + 1]
        return in_place_and_apart(
            lambda targets, sources: both.all_reduce(sources, ReduceOp.SUM, targets),
            count, dtype, own, half, iterations,
        )  # fmt: skip
    ours = {
        "mpi": mpi_reduce_into,
        "ours": lambda targets, sources: workers.all_reduce(sources, ReduceOp.SUM, targets),
    }
    call, new = (ours["ours"], shared) if who == "window" else (ours[who], plain)
    return in_place_and_apart(call, count, dtype, [comm.rank], comm, iterations, new)


answer = protocol.answers_go_to()
for command in mpi_commands.each(comm, protocol.commands()):
    seconds, wrong, note = measure(**command)
    if comm.rank == 0:
        answer(seconds=seconds, wrong=wrong, note=note)
