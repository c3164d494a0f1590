"""Construction of a worker group from the processes that MPI started, and its end at exit."""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import signal
import sys

import numpy as np
from mpi4py import MPI

from dvkernels.cluster import simulated_hosts
from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.group import WorkerGroup, check_algorithms
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
from dvkernels.communicators.workers.transport import Transport, text_of_exit
from dvkernels.devices import cpu
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import ClusterError, CollectiveTimeoutError
from dvkernels.schedules.cost_model import Routing
from dvkernels.schedules.multi_leader import host_numbers

__all__: list[str] = []

_GRACE_SECONDS = 5.0  # for other workers to raise why the group ended, before MPI_Abort
_FLUSH_SECONDS = 0.2
_LINE = 64
_SPARE_NBYTES = 1 << 16  # for MPI's own data beside a window, and for whole pages
# Number and size of the result buffers of a host where there are other hosts.
_BETWEEN_HOSTS = (NUM_RESULTS // 2, PIECE_NBYTES)

_open: list[Transport] = []
_windows: list[MPI.Win] = []  # freed by MPI_Finalize: freeing one is collective


def connect(
    resolver: ClusterResolver, timeout_seconds: float, algorithm: str = "auto"
) -> WorkerGroup:
    """Return the group of the workers that ``resolver`` counts; every worker must call this.

    ``algorithm`` is that of reductions between hosts: see ``cost_model.Routing``.

    Raises
    ------
    AlgorithmError
        Workers ask for different algorithms. Raised on all workers.
    ClusterError
        MPI started another number of processes, or lacks THREAD_MULTIPLE; an environment variable
        is malformed, or differs between workers; or a host has too little shared memory, which is
        raised on all workers.
    CollectiveTimeoutError
        A worker does not call this in time.
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
    _wait_for_all(world, timeout_seconds)
    comm = world.Split(0, resolver.worker_id)
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    routing = _agreed_routing(comm, algorithm)
    on_this_host = _split_by_host(comm)
    _check_memory(comm, on_this_host)
    transport: Transport
    if on_this_host.size == comm.size:
        transport = over_shared_memory(on_this_host, timeout_seconds)
    else:
        transport = MpiTransport(
            comm, _hosts_of(comm, on_this_host), _stagings(on_this_host), timeout_seconds, routing
        )
    return WorkerGroup(_register(transport))


def hosts_of_workers(resolver: ClusterResolver) -> list[int]:
    """Return the host number of each worker; every worker calls this, after ``connect``."""
    comm = MPI.COMM_WORLD.Split(0, resolver.worker_id)
    return _hosts_of(comm, _split_by_host(comm))


def _hosts_of(comm: MPI.Comm, on_this_host: MPI.Comm) -> list[int]:
    return host_numbers(comm.allgather(on_this_host.bcast(comm.rank)))


def _split_by_host(comm: MPI.Comm) -> MPI.Comm:
    """Return the MPI communicator of the workers of this host, or of this simulated host.

    Raises
    ------
    ClusterError
        The variable that simulates hosts is malformed, or differs between workers. Raised on all.
    """
    _check_alike(comm, simulated_hosts.VARIABLE)
    pretended = simulated_hosts.host_of_each_worker(os.environ, comm.size)
    if pretended is not None:
        comm = comm.Split(pretended[comm.rank], comm.rank)
    return comm.Split_type(MPI.COMM_TYPE_SHARED)


def _agreed_routing(comm: MPI.Comm, algorithm: str) -> Routing:
    """Return the routing of reductions; raise on all workers if theirs differ."""
    check_algorithms(comm.allgather(algorithm))
    _check_alike(comm, network_model.VARIABLE)
    return Routing(algorithm, network_model.from_environ(os.environ))


def _check_alike(comm: MPI.Comm, variable: str) -> None:
    values = comm.allgather(os.environ.get(variable, ""))
    if len({*values}) > 1:
        raise ClusterError(
            f"{variable} must be the same for all workers, and is {values}, in their order"
        )


def _check_memory(comm: MPI.Comm, here: MPI.Comm) -> None:
    """Raise on all workers if some host has too little shared memory for its workers."""
    more = () if here.size == comm.size else _BETWEEN_HOSTS
    needed = Segment.nbytes_for(here.size, *more) + _SPARE_NBYTES if here.size > 1 else 0
    found = available.free_nbytes() if here.rank == 0 else needed
    for answers in comm.allgather((platform.node(), here.size, needed, found)):
        available.check(*answers)


def _stagings(comm: MPI.Comm) -> list[Staging]:
    """Return the staging buffers of this host's workers, for each channel."""
    if comm.size == 1:
        return [LocalStaging()] * NUM_CHANNELS
    segment, may_spin = _shared_segment(comm, *_BETWEEN_HOSTS)
    return [SharedStaging(segment, channel, may_spin) for channel in range(NUM_CHANNELS)]


def over_shared_memory(comm: MPI.Comm, timeout_seconds: float) -> SharedMemoryTransport:
    """Return the shared-memory transport between the processes of ``comm``, all on one host."""
    segment, may_spin = _shared_segment(comm)
    symmetric = SymmetricMemory(comm.rank, comm.size, _MpiSegmentAllocator(comm))
    return SharedMemoryTransport(segment, timeout_seconds, may_spin, symmetric)


def _shared_segment(comm: MPI.Comm, *more: int) -> tuple[Segment, bool]:
    """Return the segment of one host's workers, and whether each has a core of its own."""
    nbytes = Segment.nbytes_for(comm.size, *more) + _LINE
    window = MPI.Win.Allocate_shared(nbytes if comm.rank == 0 else 0, 1, comm=comm)
    _windows.append(window)
    memory = _memory_of(window, 0)
    if comm.rank == 0:
        Segment.clear(memory, comm.size)
    comm.Barrier()
    segment = Segment(memory, comm.rank, comm.size, *more)
    # Also a barrier: after it every process has attached to the segment.
    cores = set().union(*comm.allgather(cpu.affinity_of(0)))
    return segment, comm.size <= min(len(cores), cpu.quota_of_this_process())


class _MpiSegmentAllocator:
    """Allocator of shared memory by MPI windows; a ``SegmentAllocator``."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm

    def free_nbytes(self) -> int:
        """Return the free shared memory of this host in bytes."""
        return available.free_nbytes()

    def open(self, nbytes: int) -> list[HostArray]:
        """Return a new segment of each process; all processes call this together."""
        # Separate pages per process, so that first touch places them near their process (NUMA).
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})
        window = MPI.Win.Allocate_shared(nbytes + _LINE, 1, info, self._comm)
        _windows.append(window)
        found = [_memory_of(window, rank)[:nbytes] for rank in range(self._comm.size)]
        # Shared memory is allocated on first touch: touch it now, as running out is fatal (SIGBUS).
        found[self._comm.rank][:] = 0
        return found


def _memory_of(window: MPI.Win, rank: int) -> HostArray:
    """Return the memory of a process in a shared window, from a cache line's start on."""
    window_bytes = np.frombuffer(window.Shared_query(rank)[0], np.uint8)
    return window_bytes[-window_bytes.ctypes.data % _LINE :]


def _wait_for_all(comm: MPI.Comm, timeout_seconds: float) -> None:
    """Wait until all processes are here: the calls that follow have no deadline."""
    if not wait.until(comm.Ibarrier().Test, wait.PROGRAMS, timeout_seconds):
        raise CollectiveTimeoutError(
            f"process {comm.rank} waited {timeout_seconds:g} s in vain for the other "
            f"{comm.size - 1} to make their strategy; give timeout_seconds if they need longer"
        )


# -- exit of the process --------------------------------------------------------------------------


def _register(transport: Transport) -> Transport:
    if not _open:
        atexit.register(_leave_at_exit, os.getpid())
    _open.append(transport)
    return transport


def _leave_at_exit(pid: int) -> None:
    """Leave the group; abort a broken job, because MPI_Finalize would wait for all processes.

    A worker that failed waits for the others to learn of it and to leave as well. MPI_Abort ends
    those that do not leave before the deadline, because they hang or were stopped.
    """
    if pid != os.getpid():
        return  # a process forked from the worker
    error = getattr(sys, "last_value", None)
    for transport in _open:
        transport.leave(text_of_exit())
    is_broken = any(transport.has_ended for transport in _open)
    is_whole = error is None and all(transport.is_settled for transport in _open)
    if is_broken or not is_whole:
        patience = max(transport.timeout_seconds for transport in _open)
        seconds = min(_GRACE_SECONDS, patience) if is_broken else patience
    else:
        seconds = _FLUSH_SECONDS  # for messages that are in flight
    is_left = wait.until(_has_everyone_left, wait.PROGRAMS, seconds)
    if is_broken or not (is_left or is_whole):
        _abort(does_any_hang=any([transport.remaining_workers() for transport in _open]))
    if any([transport.has_lost for transport in _open]):
        # Open MPI's Finalize, after the end of Python, sometimes hangs once a process was killed.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, _GRACE_SECONDS)


def _has_everyone_left() -> bool:
    are_gone = not any([transport.remaining_workers() for transport in _open])
    return are_gone and all([transport.is_settled for transport in _open])


def _abort(does_any_hang: bool) -> None:
    """End this process without MPI_Finalize; end processes that hang by MPI_Abort.

    Where all other processes are leaving too, MPI_Abort would race with their exit statuses, and
    Open MPI's launcher does not end after it once a process was killed under ``--with-ft ulfm``.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    if does_any_hang:
        MPI.COMM_WORLD.Abort(1)
    os._exit(1)
