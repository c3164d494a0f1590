"""Handler of preemption signals: save the current step, then exit."""

from __future__ import annotations

import contextlib
import signal
import threading
import weakref
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, NoReturn, Protocol, Self

from dvkernels.errors import PREEMPTED, ContextError
from dvkernels.profiler.debugging import LOGGER

__all__ = ["PreemptionHandler"]


class SupportsSave(Protocol):
    """Object that saves steps: a :class:`~dvkernels.checkpoint.manager.CheckpointManager`."""

    def save(self, step: int) -> Any:
        """Save a step, or start to save it in the background."""
        ...

    def close(self) -> None:
        """Wait until all steps are saved; raise the error of a background save."""
        ...


def _single_process(is_requested: bool) -> bool:
    """Return the decision of the only process."""
    return is_requested


class PreemptionHandler:
    """Handler of preemption signals: finish the step, save it, and exit.

    Slurm sends SIGUSR1 (``--signal=USR1@60``) or SIGTERM before it ends a job, Kubernetes SIGTERM
    before it ends a pod. The signal handler only records the signal; :meth:`after_step` acts on it,
    so no step is interrupted.

    Parameters
    ----------
    manager : CheckpointManager
        Saves the step. Closed before the exit, so that a save in the background completes.
    signals : iterable of str
        Names of signals. Names that the operating system does not know are ignored.
    exit_code : int
        Exit status of the process, which asks for a restart: 42 by default, after which
        ``python -m dvkernels launch`` leaves the restart to the batch system.
    agree : callable, optional
        Collective function for several processes, so that all save the same step: takes whether
        this process has received a signal, and returns in all of them whether any has.

    Raises
    ------
    ValueError
        A signal name that does not begin with SIG, or an exit code that is not from 0 to 255.

    Notes
    -----
    A context manager, to be entered in the main thread, where Python handles signals. The previous
    signal handlers are restored at the end.

    Examples
    --------
    >>> import signal, tempfile
    >>> import dvkernels as dv
    >>> weights = dv.Variable([0.0, 0.0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     manager = dv.CheckpointManager(dv.Checkpoint(weights=weights), folder)
    ...     try:
    ...         with dv.PreemptionHandler(manager, exit_code=42) as preemption:
    ...             for step in range(1, 100):
    ...                 weights.assign_add([1.0, 2.0])
    ...                 if step == 3:
    ...                     signal.raise_signal(signal.SIGTERM)
    ...                 preemption.after_step(step)
    ...     except SystemExit as end:
    ...         print(end.code, weights.numpy())
    42 [3. 6.]
    """

    def __init__(
        self,
        manager: SupportsSave,
        *,
        signals: Iterable[str] = ("SIGTERM", "SIGUSR1"),
        exit_code: int = PREEMPTED,
        agree: Callable[[bool], bool] = _single_process,
    ) -> None:
        self._replaced: dict[int, Any] = {}  # the previous handlers by signal
        names: list[Any] = [signals] if isinstance(signals, str) else list(signals)
        for name in names:
            if not isinstance(name, str) or not name.startswith("SIG"):
                raise ValueError(
                    f"PreemptionHandler: expected names of signals such as 'SIGTERM'; got {name!r}"
                )
        if isinstance(exit_code, bool) or not isinstance(exit_code, int):
            raise ValueError(f"PreemptionHandler: expected an exit code; got {exit_code!r}")
        if not 0 <= exit_code <= 255:
            raise ValueError(
                f"PreemptionHandler: expected an exit code from 0 to 255; got {exit_code}"
            )
        self._manager = manager
        self._numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._exit_code = exit_code
        self._agree = agree
        self._received: str | None = None

    @property
    def is_requested(self) -> bool:
        """Whether this process has received a preemption signal."""
        return self._received is not None

    @property
    def received(self) -> str | None:
        """Name of the last preemption signal that this process has received, or None."""
        return self._received

    def after_step(self, step: int) -> None:
        """Return; or, after a signal, save ``step`` and raise ``SystemExit``.

        All processes must call it after the same steps. An error of the save is raised as it is,
        and the process does not exit.
        """
        if self._agree(self.is_requested):
            self._save_and_exit(step)

    def _save_and_exit(self, step: int) -> NoReturn:
        reason = self._received or "a signal to another process"
        LOGGER.warning("%s: saving step %d, then exiting with %d", reason, step, self._exit_code)
        self._manager.save(step)
        self._manager.close()
        raise SystemExit(self._exit_code)

    def __enter__(self) -> Self:
        # An interrupt may come at any point, so each handler is remembered before it is replaced;
        # also before __exit__ begins, so what is not restored there is restored when this object
        # is dropped: the installed handler does not keep it alive.
        record, replaced = weakref.WeakMethod(self._record), self._replaced

        def on_signal(number: int, frame: FrameType | None) -> None:
            method = record()
            if method is not None:
                method(number, frame)
            else:  # dropped by another thread, which could not restore handlers
                _restore(replaced)
                signal.raise_signal(number)

        try:
            for number in self._numbers:
                replaced[number] = signal.getsignal(number)
                signal.signal(number, on_signal)
        except ValueError as error:
            replaced.clear()
            raise ContextError(
                f"PreemptionHandler: signals are handled in the main thread; enter it there "
                f"({error})"
            ) from error
        except BaseException:
            _restore(replaced)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            _restore(self._replaced)
        except ValueError as failure:
            raise ContextError(
                "PreemptionHandler: signals are handled in the main thread; leave it there"
            ) from failure

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # an interrupt may have ended __init__ early
            if threading.get_ident() == threading.main_thread().ident:
                _restore(self._replaced)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name


def _restore(replaced: dict[int, Any]) -> None:
    """Restore the handlers in a dict, which is empty afterwards; only in the main thread."""
    interrupt: BaseException | None = None
    while replaced:
        try:
            number, handler = next(iter(replaced.items()))
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
            del replaced[number]
        except ValueError:  # not in the main thread
            raise
        except BaseException as error:  # raised when all handlers are restored
            interrupt = error
    if interrupt is not None:
        raise interrupt
