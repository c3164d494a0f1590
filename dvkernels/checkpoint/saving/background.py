"""Saves one after another: while the caller waits, or in the background."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from dvkernels import user_errors
from dvkernels.checkpoint.saving.save import Save
from dvkernels.checkpoint.storage import parallel_io
from dvkernels.profiler import tracing
from dvkernels.profiler.debugging import LOGGER
from dvkernels.threads.shielded import ShieldedCall, uninterrupted
from dvkernels.user_errors import text_of

__all__: list[str] = []


class _Unfinished(NamedTuple):
    """A save that has been begun, or will be by who waits for it."""

    save: Save
    # What is done of it without the other workers; None: an interrupt has ended the call before.
    errand: ShieldedCall | None
    pid: int  # a child has no thread that does it


class BackgroundSaver:
    """Carries out saves one after another: while the caller waits, or in the background.

    Of several workers only the main threads speak to each other, so that the order of what they
    say is that of the program. So a save in the background begins at the call, a thread writes,
    and what comes next, another save or :meth:`wait`, finishes it.

    An interrupt may end any method anywhere. So what is unfinished is noted before anything is
    done, and stays noted until it is finished or undone: the next call sees to that.
    """

    def __init__(self) -> None:
        # Where snapshots are copied to, kept from save to save: the operating system would have to
        # find new memory each time, which takes longer than the copy.
        self._host: dict[str, Any] = {}
        self._unfinished: _Unfinished | None = None

    @tracing.span("save", "checkpoint")
    def save(self, prepare: Callable[[], Save], *, background: bool) -> None:
        """Carry out a save; first wait for the one before, and raise its error."""
        self.wait()
        save = prepare()
        is_alone = save.workers.size == 1
        if is_alone and not background:
            uninterrupted(save.carry_out)
            return
        if background:
            save.copied(self._copied)
        _unsettled[self] = None
        self._unfinished = _Unfinished(save, None, os.getpid())
        try:
            if not background:
                save.carry_out()
                self._settle()
                return
            if not is_alone:
                save.begin()
                _finish_before_mpi()
        except BaseException as error:
            save.abort(error)
            self._settle()
            raise
        errand = ShieldedCall(lambda: self._carry_out(save) if is_alone else save.write())
        self._unfinished = _Unfinished(save, errand, os.getpid())
        errand.start(_step_back)

    def wait(self) -> None:
        """Return when nothing is left to be written; raise what went wrong since the last call.

        Every worker calls this.
        """
        found = self._unfinished
        if found is None or found.pid != os.getpid():
            self._unfinished = None
            return
        save, errand, _ = found
        if errand is None:
            save.abort(KeyboardInterrupt())
            self._settle()
            return
        errand.wait()
        try:
            if save.workers.size > 1:
                save.finish()
        except BaseException as error:
            save.abort(error)
            self._settle()
            raise
        self._settle()
        errand.outcome()

    def leave(self, error: BaseException | None) -> None:
        """Wait, on the way out: an error tells the other workers to come and finish as well."""
        if error is not None and self._unfinished is not None:
            self._unfinished.save.workers.announce(error)
        self.wait()

    @property
    def is_busy(self) -> bool:
        """Whether something is being written in the background."""
        found = self._unfinished
        if found is None or found.errand is None or found.pid != os.getpid():
            return False
        return not found.errand.done.is_open

    def _settle(self) -> None:
        self._unfinished = None
        _unsettled.pop(self, None)

    def _carry_out(self, save: Save) -> None:
        try:
            save.carry_out()
        except BaseException as error:
            LOGGER.error("a save in the background failed: %s", user_errors.in_words(error))
            raise
        _unsettled.pop(self, None)

    def _copied(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of arrays."""
        held = self._host
        self._host = {}
        for name, array in tensors.items():
            own = held.get(name)
            if own is None or own.shape != array.shape or own.dtype != array.dtype:
                own = np.empty(array.shape, array.dtype)
            self._host[name] = own
        pairs = [(self._host[name], array) for name, array in tensors.items()]
        uninterrupted(lambda: parallel_io.copy(pairs))
        return self._host


def _step_back() -> None:
    """Run only where nobody else wants to; threads that this thread starts do likewise.

    Steps that kept two cores busy took five times as long while 1 GiB was written at the usual
    priority, and 1.1 times under ``SCHED_IDLE``. Who waits for the save frees a core, and it goes
    on at full speed.
    """
    if sys.platform == "linux":  # elsewhere a priority is that of the whole process
        own = threading.get_native_id()
        try:
            os.sched_setscheduler(own, os.SCHED_IDLE, os.sched_param(0))
        except OSError:  # a sandbox may forbid it
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, own, 19)


# Those that have something unfinished, in the same order on all workers.
_unsettled: dict[BackgroundSaver, None] = {}


@atexit.register
def _finish() -> None:
    """At the end of the program: wait, and say what nobody has asked for."""
    for saver in list(_unsettled):
        try:
            saver.leave(getattr(sys, "last_value", None))
        except BaseException as error:
            print(f"dvkernels: a save in the background failed: {text_of(error)}", file=sys.stderr)


def _finish_before_mpi() -> None:
    """See to it that the end of the program calls :func:`_finish` while workers still can talk.

    What was registered last is called first.
    """
    atexit.unregister(_finish)
    atexit.register(_finish)


class SavesInBackground:
    """An owner of a :class:`BackgroundSaver`, and a context that waits for it at the end."""

    def __init__(self) -> None:
        self._saver = BackgroundSaver()

    @property
    def is_saving(self) -> bool:
        """Whether something is being written in the background."""
        return self._saver.is_busy

    def close(self) -> None:
        """Wait for a save in the background, and raise its error; may be called twice."""
        self._saver.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._saver.leave(error)
