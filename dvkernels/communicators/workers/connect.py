"""How processes that an MPI started become the workers of a strategy, and how they end."""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from dvkernels.cluster import simulated_hosts
from dvkernels.cluster.resolvers import ClusterResolver
from dvkernels.communicators.workers.gpu import cuda_aware
from dvkernels.communicators.workers.group import Transport, WorkerGroup
from dvkernels.communicators.workers.mpi import network_model
from dvkernels.communicators.workers.mpi.transport import MpiTransport
from dvkernels.communicators.workers.shm import available
from dvkernels.communicators.workers.shm.segment import NUM_CHANNELS, Segment
from dvkernels.communicators.workers.shm.staging import (
    NUM_RESULTS,
    PIECE_NBYTES,
    LocalStaging,
    SharedStaging,
    Staging,
)
from dvkernels.communicators.workers.shm.symmetric_memory import SymmetricMemory
from dvkernels.communicators.workers.shm.transport import SharedMemoryTransport
from dvkernels.devices import cpu
from dvkernels.errors import AlgorithmError, ClusterError, CollectiveTimeoutError
from dvkernels.schedules.cost_model import Routing
from dvkernels.schedules.host_parts import host_numbers
from dvkernels.user_errors import in_words

__all__: list[str] = []

_NAP_SECONDS = 1e-3
_GRACE_SECONDS = 5.0  # for the others to raise what ended the group, before MPI ends the job
_MOMENT_SECONDS = 0.2
_LINE = 64
_SPARE_NBYTES = 1 << 16  # for what MPI itself keeps beside a window, and whole pages
# The places that the workers of a host have beside their own where there are other hosts.
_BETWEEN_HOSTS = (NUM_RESULTS // 2, PIECE_NBYTES)

_open: list[Transport] = []
_windows: list[Any] = []  # freed by MPI itself in the end: that needs all workers


def connect(resolver: ClusterResolver, timeout_seconds: float, way: str = "auto") -> WorkerGroup:
    """Return the workers that ``resolver`` counts. Every worker of the job must call this.

    ``way`` is that of reductions between hosts: see ``cost.Routing``.

    Raises
    ------
    AlgorithmError
        Workers want different ways: on all of them.
    ClusterError
        MPI started another number of processes, or offers too little; a variable is malformed, or
        differs between workers; or a host has too little memory for its workers to share. Of the
        last, all workers hear.
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
    routing = _agreed_routing(comm, way)
    on_this_host = _split_by_host(comm)
    _check_memory(comm, on_this_host)
    gpu_comms = _for_gpus(comm)
    transport: Transport
    if on_this_host.size == comm.size:
        transport = over_shared_memory(on_this_host, timeout_seconds)
    else:
        transport = MpiTransport(
            comm, _placed(comm, on_this_host), _hosts(on_this_host), timeout_seconds, routing
        )
    return WorkerGroup(_kept(transport), gpu_comms)


def _for_gpus(comm: Any) -> list[Any]:
    """Return a communicator that takes memory of GPUs for each channel; none unless all MPIs do.

    Raises
    ------
    ClusterError
        The variable that says so is malformed on some worker: on all of them.
    """
    try:
        answer, problem = cuda_aware.of_mpi().is_there, ""
    except ClusterError as error:
        answer, problem = False, str(error)
    told = comm.allgather((answer, problem))
    for worker, (_, text) in enumerate(told):
        if text:
            raise ClusterError(f"on worker {worker}: {text}")
    if comm.size == 1 or not all(takes for takes, _ in told):
        return []
    made = [comm.Dup() for _ in range(NUM_CHANNELS)]
    for one in made:
        one.Set_errhandler(MPI.ERRORS_RETURN)
    return made


def placed(resolver: ClusterResolver) -> list[int]:
    """Return the number of each worker's host. Every worker calls this, after ``connect``."""
    comm = MPI.COMM_WORLD.Split(0, resolver.worker_id)
    return _placed(comm, _split_by_host(comm))


def _placed(comm: Any, on_this_host: Any) -> list[int]:
    return host_numbers(comm.allgather(on_this_host.bcast(comm.rank)))


def _split_by_host(comm: Any) -> Any:
    """Return the communicator of the workers of this host, or of the one it pretends to be on.

    Raises
    ------
    ClusterError
        The variable that says so is malformed, or differs between workers: on all of them.
    """
    _check_alike(comm, simulated_hosts.VARIABLE)
    pretended = simulated_hosts.pretended(os.environ, comm.size)
    if pretended is not None:
        comm = comm.Split(pretended[comm.rank], comm.rank)
    return comm.Split_type(MPI.COMM_TYPE_SHARED)


def _agreed_routing(comm: Any, way: str) -> Routing:
    """Return how reductions go, which is the same for all; on all of them, or none."""
    ways = comm.allgather(way)
    if len({*ways}) > 1:
        raise AlgorithmError(
            f"between hosts all workers go the same way, and cross_device_ops leads them {ways}, "
            f"in their order; give all of them the same"
        )
    _check_alike(comm, network_model.VARIABLE)
    return Routing(way, network_model.of(os.environ))


def _check_alike(comm: Any, variable: str) -> None:
    said = comm.allgather(os.environ.get(variable, ""))
    if len({*said}) > 1:
        raise ClusterError(
            f"{variable} must be the same for all workers, and is {said}, in their order"
        )


def _check_memory(comm: Any, here: Any) -> None:
    """Raise on all workers where one host has too little memory for its workers to share."""
    more = () if here.size == comm.size else _BETWEEN_HOSTS
    needed = Segment.nbytes_for(here.size, *more) + _SPARE_NBYTES if here.size > 1 else 0
    found = available.free_nbytes() if here.rank == 0 else needed
    for told in comm.allgather((platform.node(), here.size, needed, found)):
        available.check(*told)


def _hosts(comm: Any) -> list[Staging]:
    """Return what the workers of this host share, for each channel."""
    if comm.size == 1:
        return [LocalStaging()] * NUM_CHANNELS
    room, is_roomy = _shared_room(comm, *_BETWEEN_HOSTS)
    return [SharedStaging(room, channel, is_roomy) for channel in range(NUM_CHANNELS)]


def over_shared_memory(comm: Any, timeout_seconds: float) -> SharedMemoryTransport:
    """Return the transport between the processes of ``comm``, all of one host."""
    room, is_roomy = _shared_room(comm)
    window = SymmetricMemory(comm.rank, comm.size, _MpiSegmentAllocator(comm))
    return SharedMemoryTransport(room, timeout_seconds, is_roomy, window)


def _shared_room(comm: Any, *more: int) -> tuple[Segment, bool]:
    """Return a room of the workers of one host, and whether each has a core of its own."""
    nbytes = Segment.nbytes_for(comm.size, *more) + _LINE
    window = MPI.Win.Allocate_shared(nbytes if comm.rank == 0 else 0, 1, comm=comm)
    _windows.append(window)
    held = np.frombuffer(window.Shared_query(0)[0], np.uint8)
    memory = held[-held.ctypes.data % _LINE :]
    if comm.rank == 0:
        Segment.clear(memory, comm.size)
    comm.Barrier()
    room = Segment(memory, comm.rank, comm.size, *more)
    cores = set().union(*comm.allgather(_cores()))  # after which every process stands in the room
    quota = cpu.cgroup_quota(Path("/sys/fs/cgroup"))
    return room, comm.size <= min(len(cores), quota)


class _MpiSegmentAllocator:
    """Memory from MPI that the processes of ``comm`` share; a ``SegmentAllocator``."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def free_nbytes(self) -> int:
        """Return how much is left."""
        return available.free_nbytes()

    def open(self, nbytes: int) -> list[Any]:
        """Return a new segment of each process."""
        # Each process's on pages of its own, so that they lie near the one that writes them first.
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})
        window = MPI.Win.Allocate_shared(nbytes + _LINE, 1, info, self._comm)
        _windows.append(window)
        held = [
            np.frombuffer(window.Shared_query(rank)[0], np.uint8) for rank in range(self._comm.size)
        ]
        held = [each[-each.ctypes.data % _LINE :][:nbytes] for each in held]
        # Such memory is taken when it is first touched; where there is none left, that is fatal.
        held[self._comm.rank][:] = 0
        return held


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
        atexit.register(_leave, os.getpid())
    _open.append(transport)
    return transport


def _leave(pid: int) -> None:
    """Let the others go: MPI_Finalize waits for all, so a job that is broken has to be aborted.

    A worker that failed waits for the others to hear of it and to leave as well; those that do
    not, because they hang or were stopped, are ended by MPI after the deadline.
    """
    if pid != os.getpid():
        return  # a process forked from the worker
    error = getattr(sys, "last_value", None)
    text = "it has exited" if error is None else f"it exited after {in_words(error)}"
    for transport in _open:
        transport.leave(text)
    is_broken = any(transport.has_ended for transport in _open)
    is_whole = error is None and all(transport.is_settled for transport in _open)
    if is_broken or not is_whole:
        patience = max(transport.timeout_seconds for transport in _open)
        seconds = min(_GRACE_SECONDS, patience) if is_broken else patience
    else:
        seconds = _MOMENT_SECONDS  # for words that are on their way
    deadline = time.monotonic() + seconds
    while not (is_left := _is_left_by_all()) and time.monotonic() < deadline:
        time.sleep(_NAP_SECONDS)
    if is_broken or not (is_left or is_whole):
        _abort(does_any_hang=any([transport.those_that_stay() for transport in _open]))


def _is_left_by_all() -> bool:
    are_gone = not any([transport.those_that_stay() for transport in _open])
    return are_gone and all([transport.is_settled for transport in _open])


def _abort(does_any_hang: bool) -> None:
    """End this process without MPI_Finalize, and those that hang with it.

    Where all others are leaving too, MPI_Abort would race with them for who is heard, and Open
    MPI's launcher does not end after it once a process was killed under ``--with-ft ulfm``.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    if does_any_hang:
        MPI.COMM_WORLD.Abort(1)
    os._exit(1)
