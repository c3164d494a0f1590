"""A file of results that appears whole or not at all, and is written to no other place."""

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
    """A file that will be at a path; ``OSError`` at once if it cannot be.

    It is written beside, under a name that nobody can foretell, in a folder that is held open; then
    it takes the place of what is there. A link there is replaced, not followed: who shares the
    folder could have put it there. A pipe or a device (``/dev/stdout``) is written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(os.path.abspath(os.fsdecode(path)))
            found = os.stat(self.path).st_mode
        except FileNotFoundError:
            found = stat.S_IFREG
        except ValueError as error:  # NUL, or no text
            raise OSError(errno.EINVAL, f"no file can have this name ({error})") from None
        if stat.S_ISDIR(found):
            raise IsADirectoryError(f"{self.path} is a folder; name a file")
        self._folder = -1
        if stat.S_ISREG(found):
            self._folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            self._name = f".{self.path.name}.{os.urandom(8).hex()}.partial"
        try:
            self._file = self._open()
        except BaseException:
            self._close_folder()
            raise

    def fill(self, write: Callable[[BinaryIO], object]) -> None:
        """Let the content be written, and put it in place; after an error what was there is."""
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
        """Leave everything as it was; may be called twice."""
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


def put(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text, as an :class:`AtomicFile`."""
    AtomicFile(path).fill(lambda file: file.write(text.encode()))
