"""NCCL communicators of this process's ranks: created, called and aborted together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

from dvkernels.communicators.base import Workers
from dvkernels.communicators.nccl.watchdog import Watchdog
from dvkernels.devices import cuda
from dvkernels.errors import CollectiveTimeoutError, DeviceError, WorkerLostError
from dvkernels.kernels.cuda.engine import launcher
from dvkernels.user_errors import describe

__all__: list[str] = []

_LOCK_SECONDS = 1.0
_LATE = "late"


@final
class NcclComms:
    """NCCL communicators (``ncclComm_t``) of this process's ranks, one for each of ``devices``.

    All workers create theirs at the same time, with the same ``ncclUniqueId``; ``size`` is the
    number of ranks of all workers.

    Raises
    ------
    DeviceError
        NCCL fails on a worker. Raised on all workers.
    CollectiveTimeoutError
        NCCL takes longer than half of the workers' timeout.

    Notes
    -----
    A collective that is enqueued waits on the GPU until all ranks have enqueued theirs, and cannot
    be cancelled. With several workers a ``Watchdog`` therefore supervises it. On a timeout or the
    loss of a worker it aborts NCCL's communicator in this process, after which the GPU goes on and
    the received data are undefined, and the workers' group, so that no worker uses such data.
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
        self._lock = threading.RLock()  # NCCL accepts calls of one thread at a time
        self._comms: list[Any] = []
        self._failure = ""  # not empty: why NCCL has been aborted
        self._join(ranks, size, unique_id)
        self._watchdog: Watchdog | None = None
        if workers.size > 1:
            self._watchdog = Watchdog(workers.timeout_seconds, self._devices[0])

    def _join(self, ranks: Sequence[int], size: int, unique_id: Any) -> None:
        """Create the communicators in a daemon thread: NCCL waits for all ranks forever."""
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
        # Half of it: a failure has to reach all workers before their own deadline.
        seconds = min(self._workers.timeout_seconds / 2, threading.TIMEOUT_MAX)
        thread.join(seconds)
        is_late = thread.is_alive()
        answers = self._workers.exchange(_LATE if is_late else "".join(failures))
        if any(answers) and not is_late:  # else NCCL is still creating them
            self._abort()
        for worker, answer in enumerate(answers):
            if answer not in ("", _LATE):
                raise DeviceError(
                    f"cross_device_ops='nccl': NCCL failed on worker {worker} ({answer}); "
                    f"NCCL_DEBUG=INFO in the environment makes it say more"
                )
        late = [worker for worker, answer in enumerate(answers) if answer == _LATE]
        if late:
            raise CollectiveTimeoutError(
                f"cross_device_ops='nccl': NCCL did not connect workers {late} with the others "
                f"within {seconds:g} s; NCCL_DEBUG=INFO in the environment makes it say more, and "
                f"NCCL_SOCKET_IFNAME names the network between the hosts"
            )

    def launch(self, text: str, call: Callable[[int, Any, int], None]) -> None:
        """Enqueue the calls of all ranks as one NCCL group; ``text`` names them in errors.

        ``call`` gets the index of a rank in this process, its NCCL communicator, and the address of
        the current stream of its device, while that device is current. Raises
        ``CollectiveTimeoutError`` or ``WorkerLostError`` if the group has been aborted, before or
        during the call.
        """
        try:
            seconds = min(self._workers.timeout_seconds, threading.TIMEOUT_MAX)
            if not self._lock.acquire(timeout=seconds):
                raise CollectiveTimeoutError(
                    f"another thread of worker {self._workers.rank} has been in a call of NCCL for "
                    f"{seconds:g} s"
                )
            if self._failure:
                raise WorkerLostError(f"{self._failure}, so NCCL was aborted: make a new strategy")
            if self._watchdog is None:
                self._enqueue_alone(text, call)
                return
            with self._watchdog.watch(text, self) as events:
                self._enqueue(call)
                for device in self._devices:
                    event = self._arrays.event(device)
                    with self._arrays.at(device):  # whose default stream may be the current one
                        event.record(self._arrays.current(device))
                    events.append(event)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._lock.release()
            except RuntimeError:  # not ours
                pass

    def _enqueue_alone(self, text: str, call: Callable[[int, Any, int], None]) -> None:
        """Enqueue a call of one process; if it is left half-way, no rank waits for the others."""
        try:
            self._enqueue(call)
        except BaseException as error:
            self._failure = f"{text} was left half-way ({describe(error)})"
            self._abort()
            raise

    def _enqueue(self, call: Callable[[int, Any, int], None]) -> None:
        try:
            # Kernels between GPUs that another thread launches at the same time would stand before
            # these on one GPU and behind them on another, and both would wait.
            launcher.launching.acquire()
            with self._group():
                for k, (device, comm) in enumerate(zip(self._devices, self._comms, strict=True)):
                    with self._arrays.at(device):
                        call(k, comm, self._arrays.current(device).ptr)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                launcher.launching.release()
            except RuntimeError:  # not acquired: the wait was interrupted
                pass

    @contextlib.contextmanager
    def _group(self) -> Iterator[None]:
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()

    def check(self, waited_seconds: float) -> None:
        """Raise if NCCL or the workers' group has lost a worker."""
        del waited_seconds
        if self._workers.has_ended:
            raise WorkerLostError("the workers' group has been aborted")
        for comm in self._comms:
            try:
                comm.check_async_error()
            except Exception as error:
                raise WorkerLostError(
                    f"NCCL on worker {self._workers.rank} has lost another one: {error}"
                ) from error

    def end(self, error: BaseException) -> None:
        """Abort the NCCL communicators and the workers' group."""
        try:
            self._workers.end(error)
        finally:
            # A thread that is blocked inside NCCL releases the lock only after the abort.
            has_lock = self._lock.acquire(timeout=_LOCK_SECONDS)
            self._abort()
            if has_lock:
                self._lock.release()

    def _abort(self) -> None:
        """Abort the communicators; destroying them would wait for their pending calls."""
        for comm in self._comms:
            comm.abort()
