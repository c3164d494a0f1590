"""Disks that fail and processes that die while something is saved: on purpose, one by one.

What is tested must do its file operations through ``dvkernels.checkpoint.storage.files.active``, as
checkpoints do; so may others that save by their own means.
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

from dvkernels.checkpoint.storage import files
from dvkernels.checkpoint.storage.files import Entry, FileSystem

__all__ = ["Crash", "Faults", "check_every_crash", "flip_bit", "injected", "truncate"]


class Crash(BaseException):
    """The process is taken to have died here: from now on it can do nothing to any file."""


class Faults:
    """Operations on files that go wrong in the way and at the moment asked for.

    Parameters
    ----------
    crash_at : int, optional
        Instead of the operation of this number, counted from 1, the process dies: :class:`Crash`
        is raised, then and by every operation after it. Of a write, half is written before.
    fail_at : int, optional
        The operation of this number raises ``OSError``; those after it work again.
    error : int
        The error number: ``errno.EIO``, ``errno.ENOSPC`` and so on.
    room : int, optional
        How many bytes can be written; what goes beyond raises ``ENOSPC``.
    most_at_once : int, optional
        A read or write takes at most so many bytes, and says so.
    loses : collection of str
        The power fails too. ``"content"``: files that were not synced are empty. ``"names"``: names
        are what they were when their folder was synced; what was removed stays so. A disk may lose
        one without the other.
    counted : collection of str, optional
        The operations that are counted, by name; all if not given.

    Notes
    -----
    It has the methods of ``dvkernels.checkpoint.storage.files.FileSystem``, and is used by
    :func:`injected`. ``count`` says how many operations there were, and ``calls`` which.
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
        self._lock = threading.Lock()
        self._is_dead = False
        self._open: set[int] = set()
        # A second descriptor of each file with content that was not synced: its path may change.
        self._unsynced: dict[int, int] = {}
        # How to undo what was done to names, the latest last, with the folder of the names.
        self._undo: list[tuple[Path, Callable[[], None]]] = []

    @property
    def count(self) -> int:
        """The number of operations so far."""
        return len(self.calls)

    def die(self) -> NoReturn:
        """Let the process die now."""
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
        """Remember what a crash leaves open or a power failure undoes."""
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
                # A file that is closed without a sync stays unsynced, under a number of its own.
                if descriptor in self._unsynced:
                    self._unsynced[-1 - len(self._unsynced)] = self._unsynced.pop(descriptor)
            case "sync", (descriptor,):
                if descriptor in self._unsynced:
                    os.close(self._unsynced.pop(descriptor))
            case "sync_folder", (folder,):
                self._undo = [one for one in self._undo if one[0] != folder.path]

    def end(self) -> None:
        """Close what the dead process had open, and after a power failure lose what was unsynced.

        Called by :func:`injected` when no operation is under way any more.
        """
        if self._is_dead and "content" in self._loses:
            for copy in self._unsynced.values():
                os.ftruncate(copy, 0)
        if self._is_dead and "names" in self._loses:
            for _, undo in reversed(self._undo):
                with suppress(OSError):  # what it undoes has been removed since
                    undo()
        for descriptor in (*self._unsynced.values(), *(self._open if self._is_dead else ())):
            os.close(descriptor)
        self._unsynced.clear()
        self._open.clear()


def _undoing_rename(source: Entry, target: Entry) -> Callable[[], None]:
    """Return what takes a rename back that is about to happen."""
    before, after = source.path, target.path
    replaced = after.read_bytes() if after.is_file() else None

    def undo() -> None:
        os.rename(after, before)
        if replaced is not None:
            after.write_bytes(replaced)

    return undo


@contextlib.contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Let file operations go wrong inside ``with``.

    Examples
    --------
    >>> import errno, tempfile, dvkernels as dv
    >>> from dvkernels.testing import faults
    >>> checkpoint = dv.Checkpoint(weight=dv.Variable([1.0, 2.0]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with faults.injected(faults.Faults(room=20)):
    ...         checkpoint.save(f"{folder}/run")
    Traceback (most recent call last):
    ...
    dvkernels.errors.CheckpointError: save to ... No space left on device...
    """
    with files.using(cast(FileSystem, faults)):
        try:
            yield faults
        finally:
            faults.end()


def check_every_crash(
    save: Callable[[], object], check: Callable[[], object], *, loses: Collection[str] = ()
) -> int:
    """Let a save die at each of its file operations, one after another.

    Parameters
    ----------
    save : callable
        Saves; called once for each of its operations, and once more, when it is not disturbed.
    check : callable
        Called after each death; raises if what is there now is not good.
    loses : collection of str
        The power fails each time too, and once more when the save has returned: see
        :class:`Faults`.

    Returns
    -------
    int
        How many operations a save has.

    Examples
    --------
    >>> import tempfile, dvkernels as dv
    >>> from dvkernels.testing import faults
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
    """Flip one bit of a file, counted from its beginning."""
    place, which = divmod(bit, 8)
    if not 0 <= bit < 8 * os.path.getsize(path):
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes; it has no bit {bit}")
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << which)]))


def truncate(path: str | os.PathLike[str], nbytes: int) -> None:
    """Cut a file off after so many bytes."""
    os.truncate(path, nbytes)
