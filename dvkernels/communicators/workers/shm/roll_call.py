"""Roll call of a host group: its processes come one by one, and begin when all are there.

The group waits in its file (``group_file.py``), whose control lines say which workers have come.
The last one removes the file's name, gives the file its memory and lets all begin. A worker that is
killed, gives up or does not fit ends the roll call for all, with the reason; whoever finds that
removes the name. So the file has a name only as long as somebody waits, and its memory is gone with
the last process that has mapped it, however that ends.
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
import weakref
from typing import Any, final

from dvkernels.cluster import launcher_environment, simulated_hosts
from dvkernels.cluster.host_group import HostGroup
from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.group import WorkerGroup, check_algorithms
from dvkernels.communicators.workers.shm import group_file
from dvkernels.communicators.workers.shm.group_file import HEADER_NBYTES, OPEN, GroupFile
from dvkernels.communicators.workers.shm.segment import Segment
from dvkernels.communicators.workers.shm.symmetric_memory import SymmetricMemory
from dvkernels.communicators.workers.shm.transport import SharedMemoryTransport
from dvkernels.communicators.workers.transport import GAVE_UP, LOST, Transport, text_of_exit
from dvkernels.devices import cpu
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import ClusterError, CollectiveTimeoutError, WorkerLostError
from dvkernels.threads import shielded
from dvkernels.user_errors import describe

__all__: list[str] = []

# States of the roll call, beside OPEN, LOST and GAVE_UP.
_COMPLETE, _REFUSED = 3, 4
_ERRORS = {LOST: WorkerLostError, GAVE_UP: CollectiveTimeoutError, _REFUSED: ClusterError}
_PATIENCE_SECONDS = 5.0  # to tell the others why this process leaves the roll call

_members: weakref.WeakSet[Transport] = weakref.WeakSet()


def connect(group: HostGroup, timeout_seconds: float, algorithm: str) -> WorkerGroup:
    """Return the workers of a host group, once all of them are here.

    Raises
    ------
    AlgorithmError
        They ask for different algorithms, which matter between hosts. Raised on all processes.
    ClusterError
        The path leads to something that is not of this group, a process does not fit to the
        others, or there is too little shared memory. The latter are raised on all processes.
    CollectiveTimeoutError
        Some process did not come in time. Raised on all processes that did.
    WorkerLostError
        A process has ended, or was interrupted, before all had come. Raised on all others.
    """
    if os.environ.get(simulated_hosts.VARIABLE):
        raise ClusterError(
            f"{simulated_hosts.VARIABLE} simulates several hosts, and a host group is of one; "
            f"unset it, or start the program with launch --engine mpi"
        )
    if "mpi4py" in sys.modules and launcher_environment.RANK in os.environ:
        warnings.warn(
            "this worker was started without MPI, so for mpi4py it is a job of its own; start a "
            "program that uses both with launch --engine mpi",
            stacklevel=4,  # the line that makes the strategy
        )
    made: list[WorkerGroup] = []  # kept if an interrupt swallows the result

    def join() -> None:
        call = _complete_call(group, timeout_seconds)
        made.append(WorkerGroup(_transport_of(call, timeout_seconds)))

    try:
        shielded.uninterrupted(join)
        (workers,) = made
        check_algorithms(workers.exchange(algorithm))
    except BaseException:
        for workers in made:
            workers.close()
        raise
    return workers


def _transport_of(call: RollCall, timeout_seconds: float) -> SharedMemoryTransport:
    segment, rank, size = call.segment, call.rank, call.size
    cores = set().union(*(cpu.affinity_of(segment.process_of(k)) for k in range(size)))
    may_spin = size <= min(len(cores), cpu.quota_of_this_process())
    symmetric = SymmetricMemory(rank, size, _FileSegmentAllocator(call.file, rank, size))
    transport = SharedMemoryTransport(segment, timeout_seconds, may_spin, symmetric)
    host_share = cpu.HostShare(len(cores), size)
    cpu.enter_host_group(host_share)
    pid = os.getpid()

    def leave(text: str) -> None:
        if pid == os.getpid():
            segment.leave(text)
            cpu.leave_host_group(host_share)

    transport.on_close = leave
    weakref.finalize(transport, leave, "it has dropped its strategy").atexit = False
    if not _members:
        atexit.unregister(_leave_at_exit)
        atexit.register(_leave_at_exit)
    _members.add(transport)
    return transport


def _leave_at_exit() -> None:
    for transport in [*_members]:
        if transport.on_close is not None and not transport.has_closed:
            transport.on_close(text_of_exit())


def _complete_call(group: HostGroup, timeout_seconds: float) -> RollCall:
    """Return the roll call of a group when it is complete."""
    call: RollCall | None = None

    def has_come() -> bool:
        nonlocal call
        call = RollCall.entered(group, timeout_seconds)
        return call is not None

    # Not at once where another process makes or removes the file at the same time.
    wait.until(has_come, wait.ROLL_CALL, timeout_seconds, _check_interrupt)
    if call is None:
        raise CollectiveTimeoutError(
            f"{group!r}: other groups have used the path for {timeout_seconds:g} s; give each "
            f"group a path of its own"
        )
    call.await_all()
    return call


@final
class RollCall:
    """Roll call in the file of a group, of which this process is a worker."""

    def __init__(self, group: HostGroup, file: GroupFile, timeout_seconds: float) -> None:
        self.file, self._timeout_seconds = file, timeout_seconds
        self.rank, self.size = group.task_id, group.num_workers
        self.segment = Segment(file.memory, self.rank, self.size)

    @staticmethod
    def entered(group: HostGroup, timeout_seconds: float) -> RollCall | None:
        """Return the roll call that this process has entered, in a new file or one that is there.

        None if the file has got or lost its name meanwhile.
        """
        rank, size = group.task_id, group.num_workers
        file = GroupFile.open(group.path, group.token)
        if file is None:
            nbytes = HEADER_NBYTES + Segment.nbytes_for(size)
            control_nbytes = Segment.control_nbytes_for(size)
            file = GroupFile.create(group.path, size, group.token, nbytes, control_nbytes)
            call = RollCall(group, file, timeout_seconds)
            return call if file.link() else None
        with file.locked(timeout_seconds):
            if not file.has_name:
                return None
            why = file.difference(size)
            if why is None and (other := Segment.process_in(file.memory, rank, size)):
                why = f"process {other} has come with that rank already"
            if why is not None:
                text = f"{file.path}: process {os.getpid()}, rank {rank} of {size}: {why}"
                file.settle(_REFUSED, text)
                raise ClusterError(text)
            call = RollCall(group, file, timeout_seconds)
            if not call._absent():
                call._begin()
        return call

    def await_all(self) -> None:
        """Wait until all processes are here; raise the error of the roll call's end."""
        try:
            pace, seconds = wait.ROLL_CALL, self._timeout_seconds
            if not wait.until(lambda: self.file.state != OPEN, pace, seconds, self._check):
                absent = self._absent()
                self._settle(
                    GAVE_UP,
                    f"rank {self.rank} waited {seconds:g} s in vain for ranks {absent} of "
                    f"{self.size} to make their strategy with {self.file.path}; start them with "
                    f"the same path, size and token, or give timeout_seconds if they need longer",
                )
        except BaseException as error:
            is_interrupt = isinstance(error, shielded.Cancelled)
            why = "it was interrupted" if is_interrupt else describe(error)
            self._settle(LOST, f"rank {self.rank} has left the roll call: {why}")
            raise
        state = self.file.state
        if state != _COMPLETE:
            raise _ERRORS[state](self.file.text)
        for rank in range(self.size):
            self.segment.is_alive(rank)  # opens a handle, which later processes cannot get

    def _absent(self) -> list[int]:
        return [rank for rank in range(self.size) if not self.segment.process_of(rank)]

    def _check(self, waited_seconds: float) -> None:
        """End the roll call if a process that had come is gone."""
        del waited_seconds
        _check_interrupt()
        if why := self._why_lost():
            self._settle(LOST, why)

    def _why_lost(self) -> str | None:
        segment = self.segment
        for rank in range(self.size):
            if (process := segment.process_of(rank)) and not segment.is_alive(rank):
                return (
                    f"{self.file.path}: rank {rank}, process {process}, has ended before all "
                    f"{self.size} had come (was it killed?); start all of them again"
                )
        return None

    def _begin(self) -> None:
        """Let all begin: they are here, and this process has locked the file."""
        if why := self._why_lost():
            self.file.settle(LOST, why)
            return
        nbytes = HEADER_NBYTES + Segment.nbytes_for(self.size)
        try:
            self.file.allocate(0, nbytes)
        except OSError:
            found = self.file.free_nbytes()
            text = group_file.memory_refusal(self.file.path, self.size, nbytes, found)
            self.file.settle(_REFUSED, text)
            return
        self.file.settle(_COMPLETE)

    def _settle(self, state: int, text: str) -> None:
        """Give all processes that wait their outcome, unless they have one."""
        with self.file.locked(min(self._timeout_seconds, _PATIENCE_SECONDS)):
            if self.file.state == OPEN:
                self.file.settle(state, text)


def _check_interrupt(*_: Any) -> None:
    call = shielded.current()
    if call is not None:
        call.check()


@final
class _FileSegmentAllocator:
    """Allocator of shared memory in the file of a group; a ``SegmentAllocator``."""

    def __init__(self, file: GroupFile, rank: int, size: int) -> None:
        self._file, self._rank, self._size = file, rank, size

    def free_nbytes(self) -> int:
        """Return the free bytes of the file's volume."""
        return self._file.free_nbytes()

    def open(self, nbytes: int) -> list[HostArray]:
        """Return a new segment of each process; all processes call this together."""
        return self._file.append(self._rank, self._size, nbytes)
