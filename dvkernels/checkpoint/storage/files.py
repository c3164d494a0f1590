"""The operations on files that saving and restoring use: all of them, and nothing else.

They stand in one place so that a test can put others there, which fail as disks do: see
``dvkernels.testing.faults``. No operation is retried or completed here: a short write is the
caller's to go on with, as it is with a real one.

Names are those of an open folder. So whoever exchanges a folder or puts a link in its place while
it is worked in leads nothing elsewhere; links that a user's own path contains are followed once,
when the folder is opened.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

__all__ = ["Entry", "FileSystem", "Folder"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY


class Folder(NamedTuple):
    """An open folder, and the path that it was opened by, for messages."""

    path: Path
    descriptor: int

    def __truediv__(self, name: object) -> Entry:
        return Entry(self, str(name))


class Entry(NamedTuple):
    """A name in an open folder, whether or not there is something of that name."""

    folder: Folder
    name: str

    @property
    def path(self) -> Path:
        """The path, for messages."""
        return self.folder.path / self.name

    def __str__(self) -> str:
        return str(self.path)


class FileSystem:
    """Operations of the operating system, by names and descriptors; they raise ``OSError``."""

    def open_folder(self, path: Path) -> Folder:
        """Open the folder that a path of the user's leads to."""
        return Folder(path, os.open(path, _FOLDER))

    def enter(self, entry: Entry) -> Folder:
        """Open a folder in an open one; a link to a folder is an error."""
        flags = _FOLDER | os.O_NOFOLLOW
        return Folder(entry.path, os.open(entry.name, flags, dir_fd=entry.folder.descriptor))

    def kind(self, entry: Entry) -> Literal["folder", "link", "other"] | None:
        """Say what has that name; None if there is nothing. A link is a link, wherever it leads."""
        try:
            found = os.stat(entry.name, dir_fd=entry.folder.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if stat.S_ISLNK(found.st_mode):
            return "link"
        return "folder" if stat.S_ISDIR(found.st_mode) else "other"

    def open(self, entry: Entry) -> int:
        """Return a descriptor to read a regular file; a link or a pipe is an error."""
        # Not blocking: to open a pipe that nobody writes would never return.
        return _regular(entry, os.O_RDONLY | os.O_NONBLOCK)

    def create(self, entry: Entry) -> int:
        """Return a descriptor to write a file that must not exist."""
        return _regular(entry, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

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

    def sync_folder(self, folder: Folder) -> None:
        """Return when the names in a folder have reached the disk."""
        os.fsync(folder.descriptor)

    def make_folder(self, entry: Entry) -> None:
        """Create a folder that must not exist."""
        os.mkdir(entry.name, dir_fd=entry.folder.descriptor)

    def names(self, folder: Folder) -> list[str]:
        """Return the names in a folder, sorted."""
        return sorted(os.listdir(folder.descriptor))

    def rename(self, source: Entry, target: Entry) -> None:
        """Give a file, link or folder another name; a file or empty folder there is replaced."""
        os.replace(
            source.name,
            target.name,
            src_dir_fd=source.folder.descriptor,
            dst_dir_fd=target.folder.descriptor,
        )

    def remove(self, entry: Entry) -> None:
        """Remove a file, or a link itself."""
        os.unlink(entry.name, dir_fd=entry.folder.descriptor)

    def remove_folder(self, entry: Entry) -> None:
        """Remove an empty folder."""
        os.rmdir(entry.name, dir_fd=entry.folder.descriptor)

    def open_lock(self, entry: Entry) -> int:
        """Return a descriptor of a file to lock, which is created if there is none.

        It will be written to. So it must have no other name: that could be a file of the user's.
        """
        descriptor = _regular(entry, os.O_RDWR | os.O_CREAT)
        if os.fstat(descriptor).st_nlink > 1:
            os.close(descriptor)
            raise OSError(f"{entry} is a file that has other names besides")
        return descriptor

    def lock(self, descriptor: int) -> None:
        """Lock a file, or raise ``BlockingIOError`` or ``PermissionError`` at once.

        The kernel takes the lock back when the process ends, however it ends. A child does not
        inherit it, so one that outlives its killed parent cannot hold it.
        """
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_same(self, descriptor: int, entry: Entry) -> bool:
        """Say whether a name is still that of an open file."""
        try:
            found = os.stat(entry.name, dir_fd=entry.folder.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(descriptor), found)


def _regular(entry: Entry, flags: int) -> int:
    descriptor = os.open(entry.name, flags | os.O_NOFOLLOW, 0o666, dir_fd=entry.folder.descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{entry} is not a regular file")
    return descriptor


# The ones in use, in the whole process: threads write, and they see them too.
active = FileSystem()


@contextmanager
def using(files: FileSystem) -> Iterator[None]:
    """Put other operations in place of those of the operating system."""
    global active
    before = active
    active = files
    try:
        yield
    finally:
        active = before
