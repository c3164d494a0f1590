"""All-reduce between the processes of a job: ours, and that of the MPI that started them.

Started under mpiexec in an environment that has dvkernels. A command says ``who`` is measured:

* ``mpi``: ``Allreduce``;
* ``ours``: the communicator between workers;
* ``replicas``: the first half of the processes, with two replicas each;
* ``strategy``: ``strategy.reduce`` of a number.

Arrays are reduced in place and out of place; the better of both counts.
"""

from __future__ import annotations

import functools

import mpi_commands
import numpy as np
import protocol
from mpi4py import MPI

from dvkernels.communicators import mpi, registry
from dvkernels.communicators.workers import WorkerGroup
from dvkernels.reduce_op import ReduceOp
from dvkernels.strategies.multi_worker_mirrored import MultiWorkerMirroredStrategy

TIMEOUT_SECONDS = 60.0

comm = MPI.COMM_WORLD
strategy = MultiWorkerMirroredStrategy(devices=["cpu:0"], timeout_seconds=TIMEOUT_SECONDS)
workers = registry.between_workers(strategy.cluster_resolver, TIMEOUT_SECONDS)
half = comm.Split(int(comm.rank >= comm.size // 2), comm.rank)


@functools.cache
def replicas():
    """Return the communicator of two replicas in each process of this half."""
    group = WorkerGroup(mpi.over_shared_memory(half, TIMEOUT_SECONDS))
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


def in_place_and_apart(reduce_into, count, dtype, own, group, iterations):
    """Return seconds, wrong elements and a note of ``reduce_into(targets, sources)``.

    ``own`` is the ranks whose arrays this process brings.
    """
    every = protocol.inputs(count, comm.size, dtype)
    expected = np.sum(every, axis=0, dtype=dtype)
    sources = [every[rank].copy() for rank in own]
    targets = [np.empty(count, dtype) for _ in own]
    del every
    reduce_into(targets, sources)
    wrong = sum(int((target != expected).sum()) for target in targets)
    reduce_into(sources, sources)
    wrong += sum(int((source != expected).sum()) for source in sources)
    steady = [protocol.steady(count, comm.size, dtype)[rank] for rank in own]

    def renew():
        for target, given in zip(targets, steady, strict=True):
            target[:] = given

    def measured(given):
        return seconds_of(lambda: reduce_into(targets, given), group, renew, iterations)

    apart, in_place = measured(steady), measured(targets)
    note = "in place" if in_place <= apart else "out of place"
    return min(in_place, apart), group.allreduce(wrong), note


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
    return in_place_and_apart(ours[who], count, dtype, [comm.rank], comm, iterations)


answer = protocol.answers_go_to()
for command in mpi_commands.each(comm, protocol.commands()):
    seconds, wrong, note = measure(**command)
    if comm.rank == 0:
        answer(seconds=seconds, wrong=wrong, note=note)
