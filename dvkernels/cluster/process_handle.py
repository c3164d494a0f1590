"""Handle of a process of this host, which never means a later process of the same id."""

from __future__ import annotations

import os
import select
import sys
import weakref
from collections.abc import Callable
from typing import final

from dvkernels.cluster import procfs

__all__ = ["ProcessHandle"]


@final
class ProcessHandle:
    """Handle that tells whether a process lives, also after its id is used again.

    On Linux a file descriptor of the process (pidfd), or its start time where the system gives
    none; a queue of its events on macOS, a handle on Windows.

    Parameters
    ----------
    pid : int
        The process.
    start_time : int
        When it started, see :func:`procfs.start_time_of`: another process of this id is not meant.
    """

    def __init__(self, pid: int, start_time: int) -> None:
        self._has_ended = _watch(self, pid, start_time)

    def is_alive(self) -> bool:
        """Return whether the process has not ended; a zombie has."""
        return not self._has_ended()


if sys.platform == "darwin":

    def _watch(handle: ProcessHandle, pid: int, start_time: int) -> Callable[[], bool]:
        queue = select.kqueue()
        weakref.finalize(handle, queue.close).atexit = False
        event = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
        ended = False
        try:
            queue.control([event], 0)
        except OSError:  # no such process
            ended = True

        def has_ended() -> bool:
            nonlocal ended
            ended = ended or bool(queue.control(None, 1, 0))
            return ended

        return has_ended

elif sys.platform == "win32":
    import ctypes

    _SYNCHRONIZE, _WAIT_TIMEOUT = 0x00100000, 0x102

    def _watch(handle: ProcessHandle, pid: int, start_time: int) -> Callable[[], bool]:
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(kernel.OpenProcess(_SYNCHRONIZE, False, pid))
        if not process:
            return lambda: True
        weakref.finalize(handle, kernel.CloseHandle, process).atexit = False
        return lambda: kernel.WaitForSingleObject(process, 0) != _WAIT_TIMEOUT

else:

    def _watch(handle: ProcessHandle, pid: int, start_time: int) -> Callable[[], bool]:
        def is_gone() -> bool:
            return procfs.start_time_of(pid) != start_time or procfs.state_of(pid) in "ZX"

        try:
            descriptor = os.pidfd_open(pid)
        except (OSError, AttributeError):  # no such process, too many files, or an old system
            return is_gone
        weakref.finalize(handle, os.close, descriptor).atexit = False
        if is_gone():  # the descriptor may be of a later process
            return lambda: True

        def has_ended() -> bool:
            poll = select.poll()  # two threads must not share one
            poll.register(descriptor, select.POLLIN)
            return bool(poll.poll(0))

        return has_ended
