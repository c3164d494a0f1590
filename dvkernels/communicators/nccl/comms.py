"""The ranks of this process in a communicator of NCCL: made, called and ended together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

from dvkernels.communicators.base import Workers
from dvkernels.communicators.nccl.watchdog import Watchdog
from dvkernels.devices import cuda
from dvkernels.errors import CollectiveTimeoutError, DeviceError, WorkerLostError

__all__: list[str] = []

_TURN_SECONDS = 1.0
_LATE = "late"


@final
class NcclComms:
    """The ranks of this process in a communicator of NCCL.

    Parameters
    ----------
    nccl : module
        CuPy's.
    arrays : ArrayLibrary
    devices : sequence of int
        The GPU of each rank of this process.
    workers : Workers
        All make theirs at the same time.
    ranks : sequence of int
        Those of this process.
    size : int
        The number of ranks of all workers.
    unique_id : object
        What NCCL has made for this communicator, the same for all workers.

    Raises
    ------
    DeviceError
        NCCL fails on a worker: on all of them.
    CollectiveTimeoutError
        It takes longer than half the time that workers wait for each other.

    Notes
    -----
    What is given to NCCL waits on its GPU until all ranks have been given it, and cannot be taken
    back. So where there are other workers a ``Watchdog`` looks after it: it aborts NCCL's
    communicator here, after which the GPU goes on and what it has received is not defined, and ends
    the group of the workers, so that none of them can hand that on.
    """

    def __init__(
        self,
        nccl: Any,
        arrays: cuda.ArrayLibrary,
        devices: Sequence[int],
        workers: Workers,
        ranks: Sequence[int],
        size: int,
        unique_id: Any,
    ) -> None:
        self._nccl, self._arrays, self._devices = nccl, arrays, devices
        self._workers = workers
        self._turn = threading.RLock()  # NCCL takes the calls of one thread at a time
        self._comms: list[Any] = []
        self._join(ranks, size, unique_id)
        self._watch: Watchdog | None = None
        if workers.size > 1:
            self._watch = Watchdog(workers.timeout_seconds)

    def _join(self, ranks: Sequence[int], size: int, unique_id: Any) -> None:
        """Make the ranks in a thread that can be left behind: NCCL waits for all without end."""
        failures: list[str] = []

        def make() -> None:
            try:
                with self._group():
                    for device, rank in zip(self._devices, ranks, strict=True):
                        with self._arrays.at(device):
                            comm = self._nccl.NcclCommunicator(size, unique_id, rank)
                            self._comms.append(comm)
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=make, name="dvkernels-nccl", daemon=True)
        thread.start()
        # Half of it, so that all hear from those that fail before they give each other up.
        seconds = min(self._workers.timeout_seconds / 2, threading.TIMEOUT_MAX)
        thread.join(seconds)
        is_late = thread.is_alive()
        words = self._workers.exchange(_LATE if is_late else "".join(failures))
        if any(words) and not is_late:  # else NCCL is still busy with them
            self._abort()
        for worker, word in enumerate(words):
            if word not in ("", _LATE):
                raise DeviceError(
                    f"cross_device_ops='nccl': NCCL failed on worker {worker} ({word}); "
                    f"NCCL_DEBUG=INFO in the environment makes it say more"
                )
        late = [worker for worker, word in enumerate(words) if word == _LATE]
        if late:
            raise CollectiveTimeoutError(
                f"cross_device_ops='nccl': NCCL did not connect workers {late} with the others "
                f"within {seconds:g} s; NCCL_DEBUG=INFO in the environment makes it say more, and "
                f"NCCL_SOCKET_IFNAME names the network between the hosts"
            )

    def together(self, text: str, call: Callable[[int, Any, int], None]) -> None:
        """Make the calls of all ranks, which begin when the last one has been made.

        Parameters
        ----------
        text : str
            What is called, for messages.
        call : callable
            Given the position of a rank in this process, NCCL's communicator, and the address of
            the stream that is current on its device, which is current.

        Raises
        ------
        CollectiveTimeoutError, WorkerLostError
            All has ended, before or meanwhile.
        """
        try:
            seconds = min(self._workers.timeout_seconds, threading.TIMEOUT_MAX)
            if not self._turn.acquire(timeout=seconds):
                raise CollectiveTimeoutError(
                    f"another thread of worker {self._workers.rank} has been in a call of NCCL for "
                    f"{seconds:g} s"
                )
            if self._watch is None:
                self._give(call)
                return
            with self._watch.over(text, self) as events:
                self._give(call)
                for device in self._devices:
                    event = self._arrays.event(device)
                    event.record(self._arrays.current(device))
                    events.append(event)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._turn.release()
            except RuntimeError:  # not ours
                pass

    def _give(self, call: Callable[[int, Any, int], None]) -> None:
        with self._group():
            for k, (device, comm) in enumerate(zip(self._devices, self._comms, strict=True)):
                with self._arrays.at(device):
                    call(k, comm, self._arrays.current(device).ptr)

    @contextlib.contextmanager
    def _group(self) -> Iterator[None]:
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()

    def ask(self) -> None:
        """Raise if NCCL, or the group of the workers, has lost one."""
        if self._workers.has_ended:
            raise WorkerLostError("the workers have given each other up")
        for comm in self._comms:
            try:
                comm.check_async_error()
            except Exception as error:
                raise WorkerLostError(
                    f"NCCL on worker {self._workers.rank} has lost another one: {error}"
                ) from error

    def end(self, error: BaseException) -> None:
        """Abort NCCL's communicator, and end the group of the workers."""
        try:
            self._workers.end(error)
        finally:
            # A thread that NCCL itself holds up gives its turn back only after the abort.
            has_turn = self._turn.acquire(timeout=_TURN_SECONDS)
            self._abort()
            if has_turn:
                self._turn.release()

    def _abort(self) -> None:
        """Drop the ranks: to destroy them would wait for what they have been given."""
        for comm in self._comms:
            comm.abort()
