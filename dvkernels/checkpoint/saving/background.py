"""Runner of saves, one at a time: in the foreground, or in a background thread."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from dvkernels import user_errors
from dvkernels.checkpoint.saving.save import Save
from dvkernels.checkpoint.storage import parallel_io
from dvkernels.devices.array_spec import HostArray, spec
from dvkernels.profiler.debugging import LOGGER
from dvkernels.profiler.memory_report import Holding
from dvkernels.threads.shielded import ShieldedCall, uninterrupted
from dvkernels.user_errors import text_of

__all__: list[str] = []


class _UnfinishedSave(NamedTuple):
    """Save that has been registered and is neither finished nor rolled back."""

    save: Save
    # The part that needs no other worker; None: an interrupt ended the call before it started.
    call: ShieldedCall | None
    pid: int  # a forked child does not have the thread


class BackgroundSaver:
    """Runner of saves, one at a time, in the foreground or in the background.

    Over several workers only the main threads communicate, so that the order of collective calls
    is that of the program: a background save begins in the call, a thread writes the shards, and
    the next save or :meth:`wait` finishes it.

    An interrupt may end any method at any point. So a save is registered before its first step,
    and stays registered until it is finished or rolled back, by the next call if need be.
    """

    def __init__(self) -> None:
        # The arrays that snapshots are copied to are kept for the next save: allocating their pages
        # each time takes longer than the copy.
        self._copies: dict[str, HostArray] = {}
        self._holding: Holding | None = None  # their memory
        self._unfinished: _UnfinishedSave | None = None

    def save(self, save: Save, *, background: bool) -> None:
        """Run a save; the previous one has been waited for."""
        is_single = save.workers.size == 1
        if is_single and not background:
            uninterrupted(save.carry_out)
            return
        if background:
            save.copy_tensors(self._copy)
        _unfinished_savers[self] = None
        self._unfinished = _UnfinishedSave(save, None, os.getpid())
        try:
            if not background:
                save.carry_out()
                self._unregister()
                return
            if not is_single:
                save.begin()
                _finish_before_mpi()
        except BaseException as error:
            save.abort(error)
            self._unregister()
            raise
        call = ShieldedCall(lambda: self._carry_out(save) if is_single else save.write())
        self._unfinished = _UnfinishedSave(save, call, os.getpid())
        call.start(_lower_priority)

    def wait(self) -> None:
        """Wait for the unfinished save, finish it, and raise its error. A collective call."""
        found = self._unfinished
        if found is None or found.pid != os.getpid():
            self._unfinished = None
            return
        save, call, _ = found
        if call is None:
            save.abort(KeyboardInterrupt())
            self._unregister()
            return
        call.wait()
        try:
            if save.workers.size > 1:
                save.finish()
        except BaseException as error:
            save.abort(error)
            self._unregister()
            raise
        self._unregister()
        call.outcome()

    def exit(self, error: BaseException | None) -> None:
        """Wait when a context ends, after announcing its error, so that other workers wait too."""
        if error is not None and self._unfinished is not None:
            self._unfinished.save.workers.announce(error)
        self.wait()

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written in the background."""
        found = self._unfinished
        if found is None or found.call is None or found.pid != os.getpid():
            return False
        return not found.call.done.is_open

    def _unregister(self) -> None:
        self._unfinished = None
        _unfinished_savers.pop(self, None)

    def _carry_out(self, save: Save) -> None:
        try:
            save.carry_out()
        except BaseException as error:
            LOGGER.error("a save in the background failed: %s", user_errors.describe(error))
            raise
        _unfinished_savers.pop(self, None)

    def _copy(self, tensors: Mapping[str, HostArray]) -> dict[str, HostArray]:
        """Copy arrays, into the previous copies where shape and dtype are the same."""
        previous, self._copies = self._copies, {}
        for name, array in tensors.items():
            target = previous.get(name)
            if target is None or spec(target) != spec(array):
                target = np.empty(array.shape, array.dtype)
            self._copies[name] = target
        nbytes = sum(target.nbytes for target in self._copies.values())
        self._holding = None  # that of the previous copies
        self._holding = Holding("cpu:0", "checkpoints", nbytes)
        pairs = [(self._copies[name], array) for name, array in tensors.items()]
        uninterrupted(lambda: parallel_io.copy(pairs))
        return self._copies


def _lower_priority() -> None:
    """Run this thread, and threads that it starts, only on cores that are otherwise idle.

    Steps that kept two cores busy took five times as long while 1 GiB was written at normal
    priority, and 1.1 times under ``SCHED_IDLE``. A program that waits for the save leaves it a
    core, and it runs at full speed.
    """
    if sys.platform == "linux":  # elsewhere priorities apply to the whole process
        own = threading.get_native_id()
        try:
            os.sched_setscheduler(own, os.SCHED_IDLE, os.sched_param(0))
        except OSError:  # a sandbox may forbid it
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, own, 19)


# Savers with an unfinished save, in the same order on all workers.
_unfinished_savers: dict[BackgroundSaver, None] = {}


@atexit.register
def _finish_at_exit() -> None:
    """Wait for all savers at the end of the program, and print the errors that were not raised."""
    for saver in list(_unfinished_savers):
        try:
            saver.exit(getattr(sys, "last_value", None))
        except BaseException as error:
            print(f"dvkernels: a save in the background failed: {text_of(error)}", file=sys.stderr)


def _finish_before_mpi() -> None:
    """Let :func:`_finish_at_exit` run before the exit handlers registered so far, MPI's included.

    Exit handlers run in reverse order of registration.
    """
    atexit.unregister(_finish_at_exit)
    atexit.register(_finish_at_exit)


class SavesInBackground:
    """Owner of a :class:`BackgroundSaver`; a context manager that waits for it at the end."""

    def __init__(self) -> None:
        self._saver = BackgroundSaver()

    @property
    def is_saving(self) -> bool:
        """Whether a save is being written in the background."""
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
        self._saver.exit(error)
