"""Leaving in time when the machine is about to be taken away."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, NoReturn, Protocol, Self

from dvkernels.errors import ContextError
from dvkernels.profiler.debugging import LOGGER

__all__ = ["PREEMPTED", "PreemptionHandler"]

PREEMPTED = 42  # the exit status that says: told to stop, and saved


class SupportsSave(Protocol):
    """What can save a step: a :class:`~dvkernels.checkpoint.manager.CheckpointManager`."""

    def save(self, step: int) -> Any:
        """Start to save, or save."""
        ...

    def close(self) -> None:
        """Wait until all is saved; raise what went wrong."""
        ...


def _own(is_requested: bool) -> bool:
    """Agree with oneself."""
    return is_requested


class PreemptionHandler:
    """Finish the step, save, and exit, when a signal says that the time is up.

    Slurm sends SIGUSR1 (``--signal=USR1@60``) or SIGTERM before it ends a job, Kubernetes SIGTERM
    before it ends a pod. A signal only leaves a note; :meth:`after_step` looks at it, so nothing is
    interrupted in the middle.

    Parameters
    ----------
    manager : CheckpointManager
        What saves. Closed before the exit, so that a save in the background is done.
    signals : iterable of str
        Names of signals. Those that the system does not know are left out.
    exit_code : int
        With which the process exits, so that what started it knows to start it again: 42 if not
        given, which ``python -m dvkernels launch`` leaves to the batch system.
    agree : callable, optional
        Given whether this process has been told to stop, returns whether any has, the same in
        all of them. For several processes, so that all save the same step.

    Raises
    ------
    ValueError
        No such signal, or an exit code that is not one.

    Notes
    -----
    Used with ``with``, in the main thread, where Python handles signals; there the handlers that
    were there before come back at the end.

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
        agree: Callable[[bool], bool] = _own,
    ) -> None:
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
        self._before: dict[int, Any] = {}

    @property
    def is_requested(self) -> bool:
        """Whether this process has been told to stop."""
        return self._received is not None

    def after_step(self, step: int) -> None:
        """Go on, or, where a signal has come, save ``step`` and raise ``SystemExit``.

        Over several processes every one of them must call it after the same steps. An error of
        the save is raised as it is, and the process is still there to deal with it.
        """
        if self._agree(self.is_requested):
            self._leave(step)

    def _leave(self, step: int) -> NoReturn:
        why = self._received or "a signal to another process"
        LOGGER.warning("%s: saving step %d, then exiting with %d", why, step, self._exit_code)
        self._manager.save(step)
        self._manager.close()
        raise SystemExit(self._exit_code)

    def __enter__(self) -> Self:
        # An interrupt may come between any two steps: what was before is noted before it changes.
        try:
            for number in self._numbers:
                self._before[number] = signal.getsignal(number)
                signal.signal(number, self._note)
        except ValueError as error:
            self._before.clear()
            raise ContextError(
                f"PreemptionHandler: signals are handled in the main thread; enter it there "
                f"({error})"
            ) from error
        except BaseException:
            self._restore_handlers()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        interrupt: BaseException | None = None
        while self._before:
            try:
                number, handler = next(iter(self._before.items()))
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
                del self._before[number]
            except BaseException as error:  # first all of them
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
