"""Lock file that admits one writer at a time and is released when its process ends."""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from types import TracebackType
from typing import Self

from dvkernels.checkpoint.storage import file_system
from dvkernels.checkpoint.storage.file_system import Entry
from dvkernels.errors import CheckpointError

__all__: list[str] = []

# Locks that this process holds, by process id and path: locks of the kernel exclude other processes
# only, and a fork copies this dict but not those locks. Weak: an abandoned lock is free.
_held: dict[tuple[int, str], weakref.ref[FolderLock]] = {}


class FolderLock:
    """Lock held inside ``with``; entering raises :class:`CheckpointError` if another holds it.

    A lock of the kernel, on a file that names its owner and is removed on release. An owner that
    is killed leaves an unlocked file, which the next writer locks.
    """

    def __init__(self, entry: Entry, what: str) -> None:
        self._entry = entry
        self._what = what
        self._key = (os.getpid(), os.path.realpath(entry.path))
        self._descriptor = -1
        self._is_locked = False

    def __enter__(self) -> Self:
        try:
            # setdefault is atomic: of two threads, one gets the lock.
            while (holder := _held.setdefault(self._key, weakref.ref(self))()) is not self:
                if holder is not None:
                    raise self._refusal(f"pid {os.getpid()}, this process")
                _held.pop(self._key, None)
            self._acquire()
            owner = f"pid {os.getpid()} on {socket.gethostname()}\n".ljust(80).encode()
            file_system.active.write(self._descriptor, owner, 0)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _acquire(self) -> None:
        while True:
            self._descriptor = file_system.active.open_lock(self._entry)
            try:
                file_system.active.lock(self._descriptor)
            except (BlockingIOError, PermissionError):
                raise self._refusal(self._owner()) from None
            # Another writer may have removed the file between open and lock: then open a new one.
            if file_system.active.is_same(self._descriptor, self._entry):
                self._is_locked = True
                return
            self._close()

    def _owner(self) -> str:
        text = bytearray(80)
        count = file_system.active.read(self._descriptor, text, 0)
        return text[:count].decode(errors="replace").strip() or "pid not written yet"

    def _refusal(self, owner: str) -> CheckpointError:
        return CheckpointError(
            f"{self._what}: another writer is saving there ({owner}); wait for it to end, or save "
            f"elsewhere"
        )

    def _release(self) -> None:
        if self._key[0] != os.getpid():  # a forked child does not hold the lock
            return
        try:
            # Removed while still locked, so that no other owner's file is removed. If removal
            # fails, the unlocked file does no harm.
            if self._is_locked:
                with contextlib.suppress(OSError):
                    file_system.active.remove(self._entry)
        finally:
            try:
                self._close()
            finally:
                if _held.get(self._key) is weakref.ref(self):
                    del _held[self._key]

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # the kernel has released the lock nevertheless
                file_system.active.close(descriptor)
