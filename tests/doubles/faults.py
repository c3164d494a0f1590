"""Fault injection: disks that fail, and processes that die, at a chosen file operation of a save.

The tested code must do its file operations through
``dvkernels.checkpoint.storage.file_system.active``, as checkpoints do; other code that saves files
may do so too.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, cast

from dvkernels.checkpoint.storage import file_system
from dvkernels.checkpoint.storage.file_system import Entry, FileSystem

__all__ = ["Crash", "Faults", "check_every_crash", "flip_bit", "injected", "truncate"]


class Crash(BaseException):
    """Simulated death of the process: no later file operation has an effect."""


class Faults:
    """File system whose operations fail at a chosen moment.

    Parameters
    ----------
    crash_at : int, optional
        The process dies in place of this operation, counted from 1: it and every later operation
        raise :class:`Crash`. If it is a write, half of its bytes are written first.
    fail_at : int, optional
        This operation, counted from 1, raises ``OSError``; later ones work again.
    error : int
        Number of that error: ``errno.EIO``, ``errno.ENOSPC`` and so on.
    room : int, optional
        Number of bytes that can be written; writing more raises ``ENOSPC``.
    most_at_once : int, optional
        Largest number of bytes of one read or write; longer ones are partial.
    loses : collection of str
        The power fails when the process dies. ``"content"``: files that were not synced become
        empty. ``"names"``: names are as at the last sync of their folder, but removed files stay
        removed. A disk may lose one without the other.
    counted : collection of str, optional
        Names of the operations that are counted; all if not given.

    Notes
    -----
    The methods are those of ``dvkernels.checkpoint.storage.file_system.FileSystem``;
    :func:`injected` installs it. ``count`` is the number of operations so far, ``calls`` their
    names.
    """

    def __init__(
        self,
        *,
        crash_at: int | None = None,
        fail_at: int | None = None,
        error: int = errno.EIO,
        room: int | None = None,
        most_at_once: int | None = None,
        loses: Collection[str] = (),
        counted: Collection[str] | None = None,
    ) -> None:
        self.calls: list[str] = []
        self._crash_at = crash_at
        self._fail_at = fail_at
        self._error = error
        self._room = room
        self._most = most_at_once
        self._loses = loses
        self._counted = counted
        self._real = FileSystem()
        self._lock = threading.RLock()  # a collection may close a file within an operation
        self._is_dead = False
        self._open: set[int] = set()
        # A duplicate descriptor of each file with unsynced content, since its path may change.
        self._unsynced: dict[int, int] = {}
        # The undo functions of changes of names, each with the folder, the latest change last.
        self._undo: list[tuple[Path, Callable[[], None]]] = []

    @property
    def count(self) -> int:
        """The number of operations so far."""
        return len(self.calls)

    def die(self) -> NoReturn:
        """Raise :class:`Crash`: the process dies now."""
        with self._lock:
            self._is_dead = True
        raise Crash("asked for")

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._real, name)
        return lambda *arguments: self._act(name, operation, arguments)

    def _act(self, name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        with self._lock:
            if self._is_dead:
                raise Crash(f"{name}, after the process has died")
            if self._counted is None or name in self._counted:
                self.calls.append(name)
                if self.count == self._crash_at:
                    self._is_dead = True
                    if name == "write":
                        descriptor, data, offset = arguments
                        self._real.write(descriptor, data[: len(data) // 2], offset)
                    raise Crash(f"operation {self.count}, {name}")
                if self.count == self._fail_at:
                    raise OSError(self._error, f"injected into operation {self.count}, {name}")
            if name in ("read", "write") and self._most is not None:
                descriptor, data, offset = arguments
                arguments = (descriptor, data[: self._most], offset)
            if name == "write" and self._room is not None:
                descriptor, data, offset = arguments
                if not self._room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                arguments = (descriptor, data[: self._room], offset)
                self._room -= len(arguments[1])
            if name == "rename":
                self._undo.append((arguments[1].folder.path, _undoing_rename(*arguments)))
        result = operation(*arguments)
        with self._lock:
            self._note(name, arguments, result)
        return result

    def _note(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Record the files that are open, and the changes that a power failure would undo."""
        match name, arguments:
            case "open" | "open_lock", _:
                self._open.add(result)
            case "open_folder" | "enter", _:
                self._open.add(result.descriptor)
            case "create", (entry,):
                self._open.add(result)
                self._unsynced[result] = os.dup(result)
                self._undo.append((entry.folder.path, entry.path.unlink))
            case "make_folder", (entry,):
                self._undo.append((entry.folder.path, entry.path.rmdir))
            case "close", (descriptor,):
                self._open.discard(descriptor)
                # A file that is closed without a sync stays unsynced, under a negative key.
                if descriptor in self._unsynced:
                    self._unsynced[-1 - len(self._unsynced)] = self._unsynced.pop(descriptor)
            case "sync", (descriptor,):
                if descriptor in self._unsynced:
                    os.close(self._unsynced.pop(descriptor))
            case "sync_folder", (folder,):
                self._undo = [one for one in self._undo if one[0] != folder.path]

    def end(self) -> None:
        """Close the files of the dead process; after a power failure, discard unsynced changes.

        Called by :func:`injected` when no operation is under way any more.
        """
        if self._is_dead and "content" in self._loses:
            for copy in self._unsynced.values():
                os.ftruncate(copy, 0)
        if self._is_dead and "names" in self._loses:
            for _, undo in reversed(self._undo):
                with suppress(OSError):  # the name has been removed since
                    undo()
        for descriptor in (*self._unsynced.values(), *(self._open if self._is_dead else ())):
            os.close(descriptor)
        self._unsynced.clear()
        self._open.clear()


def _undoing_rename(source: Entry, target: Entry) -> Callable[[], None]:
    """Return the function that undoes a rename; called before the rename."""
    before, after = source.path, target.path
    replaced = after.read_bytes() if after.is_file() else None

    def undo() -> None:
        os.rename(after, before)
        if replaced is not None:
            after.write_bytes(replaced)

    return undo


@contextlib.contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Inject ``faults`` into the file operations inside ``with``.

    Examples
    --------
    >>> import errno, tempfile, dvkernels as dv
    >>> import faults
    >>> checkpoint = dv.Checkpoint(weight=dv.Variable([1.0, 2.0]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with faults.injected(faults.Faults(room=20)):
    ...         checkpoint.save(f"{folder}/run")
    Traceback (most recent call last):
    ...
    dvkernels.errors.CheckpointError: save to ... No space left on device...
    """
    with file_system.using(cast(FileSystem, faults)):
        try:
            yield faults
        finally:
            faults.end()


def check_every_crash(
    save: Callable[[], object], check: Callable[[], object], *, loses: Collection[str] = ()
) -> int:
    """Crash a save at each of its file operations, one crash per call.

    Parameters
    ----------
    save : callable
        Saves. Called once for each of its file operations, and once more without a crash.
    check : callable
        Called after each crash; raises if the files are not as they must be.
    loses : collection of str
        The power fails at each crash, and once more after the complete save: see :class:`Faults`.

    Returns
    -------
    int
        Number of file operations of a save.

    Examples
    --------
    >>> import tempfile, dvkernels as dv
    >>> import faults
    >>> weight = dv.Variable(0.0)
    >>> checkpoint = dv.Checkpoint(weight=weight)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(f"{folder}/run")
    ...     weight.assign(1.0)
    ...     def check():
    ...         found = dv.Variable(-1.0)
    ...         dv.Checkpoint(weight=found).restore(f"{folder}/run")
    ...         assert float(found) in (0.0, 1.0)
    ...     faults.check_every_crash(lambda: checkpoint.save(f"{folder}/run"), check) > 10
    True
    """
    for number in itertools.count(1):
        with injected(Faults(crash_at=number, loses=loses)) as faults, suppress(Crash):
            save()
            faults.die()
        check()
        if faults.count < number:
            return faults.count
    raise AssertionError("unreachable")


def flip_bit(path: str | os.PathLike[str], bit: int) -> None:
    """Flip one bit of a file; bits are counted from its beginning."""
    place, which = divmod(bit, 8)
    if not 0 <= bit < 8 * os.path.getsize(path):
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes; it has no bit {bit}")
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << which)]))


def truncate(path: str | os.PathLike[str], nbytes: int) -> None:
    """Truncate a file to ``nbytes`` bytes."""
    os.truncate(path, nbytes)
