"""How processes that an MPI started become the workers of a strategy. The only file with mpi4py."""

from __future__ import annotations

import atexit
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from dvkernels.cluster.resolvers import ClusterResolver
from dvkernels.communicators.room import Room
from dvkernels.communicators.shared_memory import SharedMemory
from dvkernels.communicators.workers import Transport, WorkerGroup
from dvkernels.devices import cpu
from dvkernels.errors import ClusterError, CollectiveTimeoutError

__all__: list[str] = []

_NAP_SECONDS = 1e-3
_GRACE_SECONDS = 5.0  # for the others to raise what ended the group, before MPI ends the job
_LINE = 64

_open: list[Transport] = []
_windows: list[Any] = []  # freed by MPI itself in the end: that needs all workers


def connect(resolver: ClusterResolver, timeout_seconds: float) -> WorkerGroup:
    """Return the workers that ``resolver`` counts. Every worker of the job must call this.

    Raises
    ------
    ClusterError
        MPI started another number of processes, or offers too little.
    CollectiveTimeoutError
        Some of them do not call this in time.
    """
    world = MPI.COMM_WORLD
    if world.size != resolver.num_workers:
        raise ClusterError(
            f"{resolver!r} counts {resolver.num_workers} workers, and MPI started {world.size} "
            f"processes; start the program with mpiexec -n {resolver.num_workers}, or with srun "
            f"and the --mpi that this MPI needs"
        )
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ClusterError(
            "MPI was initialized without THREAD_MULTIPLE, and replicas are threads; leave "
            "mpi4py.rc.thread_level as it is"
        )
    _await_all(world, timeout_seconds)
    comm = world.Split(0, resolver.worker_id)
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    transport = over_shared_memory(comm, timeout_seconds)
    return WorkerGroup(_kept(transport))


def over_shared_memory(comm: Any, timeout_seconds: float) -> SharedMemory:
    """Return the transport between processes of one host."""
    nbytes = Room.nbytes_for(comm.size) + _LINE
    window = MPI.Win.Allocate_shared(nbytes if comm.rank == 0 else 0, 1, comm=comm)
    _windows.append(window)
    held = np.frombuffer(window.Shared_query(0)[0], np.uint8)
    memory = held[-held.ctypes.data % _LINE :]
    if comm.rank == 0:
        Room.clear(memory, comm.size)
    comm.Barrier()
    room = Room(memory, comm.rank, comm.size)
    cores = set().union(*comm.allgather(_cores()))  # after which every process stands in the room
    quota = cpu.cgroup_quota(Path("/sys/fs/cgroup"))
    return SharedMemory(room, timeout_seconds, comm.size <= min(len(cores), quota))


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _await_all(comm: Any, timeout_seconds: float) -> None:
    """Return when all processes are here: what follows waits for them without a deadline."""
    here = comm.Ibarrier()
    deadline = time.monotonic() + timeout_seconds
    while not here.Test():
        if time.monotonic() > deadline:
            raise CollectiveTimeoutError(
                f"process {comm.rank} waited {timeout_seconds:g} s in vain for the other "
                f"{comm.size - 1} to make their strategy; give timeout_seconds if they need longer"
            )
        time.sleep(_NAP_SECONDS)


# -- the end of the process -----------------------------------------------------------------------


def _kept(transport: Transport) -> Transport:
    if not _open:
        atexit.register(_leave)
    _open.append(transport)
    return transport


def _leave() -> None:
    """Let the others go: MPI_Finalize waits for all, so a job that is broken has to be aborted.

    A worker that failed waits for the others to hear of it and to leave as well; those that do
    not, because they hang or were stopped, are ended by MPI after the deadline.
    """
    error = getattr(sys, "last_value", None)
    text = "it has exited" if error is None else f"it exited after {type(error).__name__}: {error}"
    for transport in _open:
        transport.leave(text)
    is_broken = any(transport.has_ended for transport in _open)
    if error is None and not is_broken:
        return
    patience = max(transport.timeout_seconds for transport in _open)
    deadline = time.monotonic() + (min(_GRACE_SECONDS, patience) if is_broken else patience)
    while any(transport.those_that_stay() for transport in _open):
        if time.monotonic() > deadline:
            break
        time.sleep(_NAP_SECONDS)
    else:
        if not is_broken:
            return
    sys.stdout.flush()
    sys.stderr.flush()
    MPI.COMM_WORLD.Abort(1)
