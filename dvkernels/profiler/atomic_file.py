"""Atomic writing of a result file: the whole file appears at its path, or nothing changes."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__: list[str] = []


class AtomicFile:
    """File that is written under a temporary name and then replaces the file at its path.

    The constructor raises ``OSError`` if no file can be created there. The temporary name is
    random, and the folder is held open by a descriptor, so nobody who shares the folder can
    redirect the writing. A symbolic link at the path is replaced, not followed, for the same
    reason. A pipe or a device (``/dev/stdout``) is written to directly.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(os.path.abspath(os.fsdecode(path)))
            mode = os.stat(self.path).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        except ValueError as error:  # a NUL, or undecodable bytes
            raise OSError(errno.EINVAL, f"no file can have this name ({error})") from None
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{self.path} is a folder; name a file")
        self._folder = -1
        self._file: BinaryIO | None = None
        self._name = f".{self.path.name}.{os.urandom(8).hex()}.partial"
        try:
            if stat.S_ISREG(mode):
                self._folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            self._file = self._open()
        except BaseException:
            self.discard()
            raise

    @property
    def is_open(self) -> bool:
        """Whether the file has been neither filled nor discarded."""
        return self._file is not None and not self._file.closed

    def fill(self, write: Callable[[BinaryIO], object]) -> None:
        """Call ``write`` with the file, and put it in place; after an error the old file stays."""
        assert self._file is not None
        try:
            with self._file as file:
                write(file)
            if self._folder >= 0:
                os.replace(
                    self._name, self.path.name,
                    src_dir_fd=self._folder, dst_dir_fd=self._folder,
                )  # fmt: skip
        except BaseException:
            self.discard()
            raise
        self._close_folder()

    def discard(self) -> None:
        """Remove the temporary file and leave the old one; may be called twice."""
        if self._file is not None:
            self._file.close()
        if self._folder >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=self._folder)
        self._close_folder()

    def _open(self) -> BinaryIO:
        if self._folder < 0:
            return open(self.path, "wb")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(self._name, flags, 0o666, dir_fd=self._folder)
        return open(descriptor, "wb")

    def _close_folder(self) -> None:
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    AtomicFile(path).fill(lambda file: file.write(text.encode()))
