"""Pickles in files without a name, by which a launched function and its result travel.

Arrays of at least 64 KiB lie in the file as they are: they are written once, every process that
reads the file maps them, and a page is copied when somebody writes to it. The file vanishes with
the last process that has it open, however that one ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

from dvkernels import pickling

__all__ = ["new_file", "read", "write"]

_MIN_NBYTES = 1 << 16  # of an array outside the pickle: a few pages
_WRITTEN = 1  # number of a message whose head has been written


def new_file() -> int:
    """Return the descriptor of a new file in memory; on other systems than Linux, on disk."""
    if hasattr(os, "memfd_create"):  # not limited by the size of /dev/shm
        return os.memfd_create("dvkernels")
    with tempfile.TemporaryFile(buffering=0) as file:
        return os.dup(file.fileno())


def write(fd: int, value: Any) -> None:
    """Write a value to an empty file; its head comes last, so that half a value is none."""
    head, *pieces = pickling.encode(value, _WRITTEN, _MIN_NBYTES)
    offset = head.nbytes
    for piece in pieces:
        offset = _write_at(fd, piece, offset)
    _write_at(fd, head, 0)


def read(fd: int) -> Any:
    """Return the value of a file; raise ``EOFError`` where none was written completely."""
    if os.fstat(fd).st_size < pickling.HEAD_NBYTES:
        raise EOFError("nothing was written")
    content = memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY))
    if pickling.number_of(content) != _WRITTEN:
        raise EOFError("the writer has ended before it was done")
    return pickling.decode(content)


def _write_at(fd: int, content: memoryview, offset: int) -> int:
    """Write all of the content at an offset; return the offset behind it."""
    while content:
        written = os.pwrite(fd, content, offset)
        content, offset = content[written:], offset + written
    return offset
