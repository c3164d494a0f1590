"""One writer at a time: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from types import TracebackType
from typing import Self

from dvkernels.checkpoint.storage import files
from dvkernels.checkpoint.storage.files import Entry
from dvkernels.errors import CheckpointError

__all__: list[str] = []

# Held by this process, by path: the kernel's locks are between processes. With the process's id,
# because a fork copies this and not the locks. Weakly: a lock that nobody has any more is free.
_held: dict[tuple[int, str], weakref.ref[FolderLock]] = {}


class FolderLock:
    """Held inside ``with``; :class:`CheckpointError` at once if another writer holds it.

    The lock is the kernel's, on a file that names its owner and is removed at the end. What a
    killed owner leaves is an unlocked file, and the next one takes it.
    """

    def __init__(self, entry: Entry, what: str) -> None:
        self._entry = entry
        self._what = what
        self._key = (os.getpid(), os.path.realpath(entry.path))
        self._descriptor = -1
        self._is_locked = False

    def __enter__(self) -> Self:
        try:
            # setdefault is atomic: of two threads, one holds it.
            while (holder := _held.setdefault(self._key, weakref.ref(self))()) is not self:
                if holder is not None:
                    raise self._refusal(f"pid {os.getpid()}, this process")
                _held.pop(self._key, None)
            self._acquire()
            owner = f"pid {os.getpid()} on {socket.gethostname()}\n".ljust(80).encode()
            files.active.write(self._descriptor, owner, 0)
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._let_go()

    def _acquire(self) -> None:
        while True:
            self._descriptor = files.active.open_lock(self._entry)
            try:
                files.active.lock(self._descriptor)
            except (BlockingIOError, PermissionError):
                raise self._refusal(self._owner()) from None
            # Another writer may have removed it between open and lock: then it is no lock.
            if files.active.is_same(self._descriptor, self._entry):
                self._is_locked = True
                return
            self._close()

    def _owner(self) -> str:
        text = bytearray(80)
        count = files.active.read(self._descriptor, text, 0)
        return text[:count].decode(errors="replace").strip() or "which has not said its pid yet"

    def _refusal(self, owner: str) -> CheckpointError:
        return CheckpointError(
            f"{self._what}: another writer is saving there ({owner}); wait for it to end, or save "
            f"elsewhere"
        )

    def _let_go(self) -> None:
        if self._key[0] != os.getpid():  # a child that was forked meanwhile does not hold it
            return
        try:
            # Locked to the end, so that nobody's lock but ours is removed. If it cannot be: an
            # unlocked file does no harm.
            if self._is_locked:
                with contextlib.suppress(OSError):
                    files.active.remove(self._entry)
        finally:
            try:
                self._close()
            finally:
                if _held.get(self._key) is weakref.ref(self):
                    del _held[self._key]

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # the kernel has let go of it all the same
                files.active.close(descriptor)
