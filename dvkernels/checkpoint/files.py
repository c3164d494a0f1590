"""The operations on files that saving and restoring use: all of them, and nothing else.

They stand in one place so that a test can put others there, which fail as disks do: see
``dvkernels.testing.faults``. No operation is retried or completed here: a short write is the
caller's to go on with, as it is with a real one.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Files"]


class Files:
    """Operations of the operating system, by paths and descriptors; they raise ``OSError``."""

    def open(self, path: Path) -> int:
        """Return a descriptor to read a regular file; a link or a pipe is an error."""
        # Not blocking: to open a pipe that nobody writes would never return.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(f"{path} is not a regular file")
        return descriptor

    def create(self, path: Path) -> int:
        """Return a descriptor to write a file that must not exist."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def size(self, descriptor: int) -> int:
        """Return the bytes that a file has."""
        return os.fstat(descriptor).st_size

    def read(self, descriptor: int, buffer: Any, offset: int) -> int:
        """Fill a buffer from ``offset`` on; return how many bytes there were, 0 at the end."""
        return os.preadv(descriptor, [buffer], offset)

    def write(self, descriptor: int, data: Any, offset: int) -> int:
        """Write from ``offset`` on; return how many bytes were taken, which may be fewer."""
        return os.pwrite(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        """Return when a file's content has reached the disk."""
        os.fsync(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Return when the names in a folder have reached the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_folder(self, path: Path) -> None:
        """Create a folder that must not exist, in one that does."""
        os.mkdir(path)

    def names(self, path: Path) -> list[str]:
        """Return the names in a folder, sorted."""
        return sorted(os.listdir(path))

    def is_folder(self, path: Path) -> bool:
        """Say whether there is a folder of that name."""
        return path.is_dir()

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name; a file or empty folder of that name is replaced."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def open_lock(self, path: Path) -> int:
        """Return a descriptor of a file to lock, which is created if there is none."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    def lock(self, descriptor: int) -> None:
        """Lock a file, or raise ``BlockingIOError`` or ``PermissionError`` at once.

        The kernel takes the lock back when the process ends, however it ends. A child does not
        inherit it, so one that outlives its killed parent cannot hold it.
        """
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_same(self, descriptor: int, path: Path) -> bool:
        """Say whether a path still leads to an open file."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            return False


# The ones in use, in the whole process: threads write, and they see them too.
active = Files()


@contextmanager
def using(files: Files) -> Iterator[None]:
    """Put other operations in place of those of the operating system."""
    global active
    before = active
    active = files
    try:
        yield
    finally:
        active = before
