"""Saves one after another: while the caller waits, or in the background."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from dvkernels.checkpoint import transfer
from dvkernels.checkpoint.save import Save
from dvkernels.devices import threads
from dvkernels.profiler import tracing
from dvkernels.profiler.debugging import LOGGER
from dvkernels.user_errors import text_of

__all__: list[str] = []


class Saver:
    """Carries out saves one after another: while the caller waits, or in the background.

    Of several workers only the main threads speak to each other, so that the order of what they
    say is that of the program. So a save in the background begins at the call, a thread writes,
    and what comes next, another save or :meth:`wait`, finishes it.
    """

    def __init__(self) -> None:
        # Where snapshots are copied to, kept from save to save: the operating system would have to
        # find new memory each time, which takes longer than the copy.
        self._host: dict[str, Any] = {}
        # Not the thread: up to Python 3.12 an interrupted join takes it for ended.
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._failure: list[BaseException] = []
        self._unfinished: Save | None = None

    @tracing.span("save", "checkpoint")
    def save(self, prepare: Callable[[], Save], *, background: bool) -> None:
        """Carry out a save; first wait for the one before, and raise its error."""
        self.wait()
        save = prepare()
        if not background:
            save.begin()
            save.write()
            save.finish()
            return
        save.copied(self._copied)
        is_alone = save.workers.size == 1
        if not is_alone:
            save.begin()
            self._unfinished = save
            _finish_before_mpi()

        def work() -> None:
            try:
                _step_back()
                if is_alone:
                    save.begin()
                save.write()
                if is_alone:
                    save.finish()
                    _unsettled.pop(self, None)
            except BaseException as error:
                self._failure.append(error)
                LOGGER.error("a save in the background failed: %s", error)
            finally:
                self._is_idle.set()

        _unsettled[self] = None
        self._is_idle.clear()
        try:
            # Not a daemon: the interpreter waits for it before it ends.
            threads.start([threading.Thread(target=work, name="dvkernels-checkpoint")])
        except RuntimeError:
            self._is_idle.set()
            if is_alone:
                self.forget()
                raise
            save.write()  # the other workers count on it

    def wait(self) -> None:
        """Return when nothing is left to be written; raise what went wrong since the last call.

        Every worker calls this.
        """
        self._is_idle.wait()
        save, self._unfinished = self._unfinished, None
        if save is not None:
            _unsettled.pop(self, None)
            save.finish()
        if self._failure:
            _unsettled.pop(self, None)
            raise self._failure.pop()

    def leave(self, error: BaseException | None) -> None:
        """Wait, on the way out: an error tells the other workers to come and finish as well."""
        if error is not None and self._unfinished is not None:
            self._unfinished.workers.announce(error)
        self.wait()

    @property
    def is_busy(self) -> bool:
        """Whether something is being written in the background."""
        return not self._is_idle.is_set()

    def forget(self) -> None:
        """Take it that nobody writes: a child has no thread that does."""
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._failure = []
        self._unfinished = None
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
        transfer.copy([(self._host[name], array) for name, array in tensors.items()])
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


# Those that write, have something to finish, or have failed and not said so, in the same order on
# all workers.
_unsettled: dict[Saver, None] = {}


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


def _forget() -> None:
    for saver in list(_unsettled):
        saver.forget()


os.register_at_fork(after_in_child=_forget)


class Saves:
    """What saves by a :class:`Saver` of its own, and is a context that waits for it at the end."""

    def __init__(self) -> None:
        self._saver = Saver()

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
