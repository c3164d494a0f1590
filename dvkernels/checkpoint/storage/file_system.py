"""File operations of saving and restoring, all of which go through :data:`active`.

So a test can replace them by operations that fail as disks do.
No operation is retried or completed here: after a short write the caller continues, as after
``os.pwrite``.

An entry is a name relative to an open folder. So replacing a folder by a link during a save
redirects nothing. Links in a user's own path are followed once, when the folder is opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["Entry", "FileSystem", "Folder"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY


class Folder(NamedTuple):
    """Open folder, and the path that it was opened by, for messages."""

    path: Path
    descriptor: int

    def __truediv__(self, name: object) -> Entry:
        return Entry(self, str(name))


class Entry(NamedTuple):
    """Name in an open folder, whether it exists or not."""

    folder: Folder
    name: str

    @property
    def path(self) -> Path:
        """Path of the entry, for messages."""
        return self.folder.path / self.name

    def __str__(self) -> str:
        return str(self.path)


class FileSystem:
    """File operations of the operating system; they raise ``OSError``."""

    def open_folder(self, path: Path) -> Folder:
        """Open the folder at a user's path, following links."""
        return Folder(path, os.open(path, _FOLDER))

    def enter(self, entry: Entry) -> Folder:
        """Open a folder inside an open one; a link to a folder is an error."""
        flags = _FOLDER | os.O_NOFOLLOW
        return Folder(entry.path, os.open(entry.name, flags, dir_fd=entry.folder.descriptor))

    def kind(self, entry: Entry) -> Literal["folder", "link", "other"] | None:
        """Return the kind of an entry, without following links; None if it does not exist."""
        found = _status(entry)
        if found is None:
            return None
        if stat.S_ISLNK(found.st_mode):
            return "link"
        return "folder" if stat.S_ISDIR(found.st_mode) else "other"

    def open(self, entry: Entry) -> int:
        """Return a descriptor to read a regular file; a link or a pipe is an error."""
        # Nonblocking: opening a pipe without a writer would never return.
        return _regular(entry, os.O_RDONLY | os.O_NONBLOCK)

    def create(self, entry: Entry) -> int:
        """Return a descriptor to write a file that must not exist."""
        return _regular(entry, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def size(self, descriptor: int) -> int:
        """Return the size of a file in bytes."""
        return os.fstat(descriptor).st_size

    def read(self, descriptor: int, buffer: bytearray | memoryview, offset: int) -> int:
        """Read from ``offset`` into a buffer; return the number of bytes read, 0 at the end."""
        return os.preadv(descriptor, [buffer], offset)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        """Write at ``offset``; return the number of bytes written, which may be fewer."""
        return os.pwrite(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        """Flush the content of a file to the disk."""
        os.fsync(descriptor)

    def sync_folder(self, folder: Folder) -> None:
        """Flush the names in a folder to the disk."""
        os.fsync(folder.descriptor)

    def make_folder(self, entry: Entry) -> None:
        """Create a folder that must not exist."""
        os.mkdir(entry.name, dir_fd=entry.folder.descriptor)

    def names(self, folder: Folder) -> list[str]:
        """Return the names in a folder, sorted."""
        return sorted(os.listdir(folder.descriptor))

    def rename(self, source: Entry, target: Entry) -> None:
        """Rename a file, link or folder; a file or empty folder at the target is replaced."""
        os.replace(
            source.name,
            target.name,
            src_dir_fd=source.folder.descriptor,
            dst_dir_fd=target.folder.descriptor,
        )

    def remove(self, entry: Entry) -> None:
        """Remove a file, or a link but not its target."""
        os.unlink(entry.name, dir_fd=entry.folder.descriptor)

    def remove_folder(self, entry: Entry) -> None:
        """Remove an empty folder."""
        os.rmdir(entry.name, dir_fd=entry.folder.descriptor)

    def open_lock(self, entry: Entry) -> int:
        """Return a descriptor of a lock file, which is created if it does not exist.

        The caller writes to it, so a file with other hard links, which may be a user's, is refused.
        """
        descriptor = _regular(entry, os.O_RDWR | os.O_CREAT)
        if os.fstat(descriptor).st_nlink > 1:
            os.close(descriptor)
            raise OSError(f"{entry} is a file that has other names (hard links)")
        return descriptor

    def lock(self, descriptor: int) -> None:
        """Lock a file, or raise ``BlockingIOError`` or ``PermissionError`` at once.

        The kernel releases the lock when the process ends, for whatever reason. A child does not
        inherit it, so no child that outlives its parent can hold it.
        """
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_same(self, descriptor: int, entry: Entry) -> bool:
        """Return whether an entry still names an open file."""
        found = _status(entry)
        return found is not None and os.path.samestat(os.fstat(descriptor), found)


def _status(entry: Entry) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(entry.name, dir_fd=entry.folder.descriptor, follow_symlinks=False)
    return None


def _regular(entry: Entry, flags: int) -> int:
    descriptor = os.open(entry.name, flags | os.O_NOFOLLOW, 0o666, dir_fd=entry.folder.descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{entry} is not a regular file")
    return descriptor


# Used by the whole process, and not a context variable, because other threads write as well.
active = FileSystem()


@contextlib.contextmanager
def using(files: FileSystem) -> Iterator[None]:
    """Replace :data:`active` inside ``with``."""
    global active
    previous = active
    active = files
    try:
        yield
    finally:
        active = previous
