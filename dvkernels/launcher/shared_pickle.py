"""Pickles in files without a name, by which a launched function and its result travel.

Arrays of at least 64 KiB lie in the file as they are: they are written once, every process that
reads the file maps them, and a page is copied when somebody writes to it. The file vanishes with
the last process that has it open, however that one ends.
"""

from __future__ import annotations

import collections
import functools
import io
import linecache
import mmap
import os
import pickle
import struct
import tempfile
import types
from typing import Any, ClassVar

__all__ = ["new_file", "read", "write"]

_MIN_NBYTES = 1 << 16  # of an array outside the pickle: a few pages
_ALIGNMENT = 64  # of arrays: a line of the caches, as NumPy's own
_HEADER = struct.Struct("<QQ")  # bytes of the pickle, number of arrays; their sizes follow


def new_file() -> int:
    """Return the descriptor of a new file in memory; on other systems than Linux, on disk."""
    if hasattr(os, "memfd_create"):  # not limited by the size of /dev/shm
        return os.memfd_create("dvkernels")
    with tempfile.TemporaryFile(buffering=0) as file:
        return os.dup(file.fileno())


def write(fd: int, value: Any) -> None:
    """Write a value to an empty file; its header comes last, so that half a value is none."""
    buffers: list[memoryview] = []

    def stays_inside(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _MIN_NBYTES:
            return True
        buffers.append(view)
        return False

    content = io.BytesIO()
    _pickler_class()(content, protocol=5, buffer_callback=stays_inside).dump(value)
    pickled = content.getbuffer()
    sizes = [view.nbytes for view in buffers]
    header = _HEADER.pack(len(pickled), len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
    offset = len(header)
    for part in (pickled, *buffers):
        offset = _write_at(fd, part, offset)
        offset += -offset % _ALIGNMENT
    os.ftruncate(fd, max(offset, len(header)))
    _write_at(fd, memoryview(header), 0)


def read(fd: int) -> Any:
    """Return the value of a file; raise ``EOFError`` where none was written completely."""
    if os.fstat(fd).st_size < _HEADER.size:
        raise EOFError("nothing was written")
    content = memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY))
    pickle_nbytes, count = _HEADER.unpack_from(content)
    if pickle_nbytes == 0:
        raise EOFError("the writer has ended before it was done")
    sizes = struct.unpack_from(f"<{count}Q", content, _HEADER.size)
    offset = _HEADER.size + 8 * count
    parts = []
    for nbytes in (pickle_nbytes, *sizes):
        parts.append(content[offset : offset + nbytes])
        offset += nbytes
        offset += -offset % _ALIGNMENT
    return pickle.loads(parts[0], buffers=parts[1:])


@functools.cache
def _pickler_class() -> Any:
    """Return cloudpickle's pickler, but code keeps the names of its files, for tracebacks."""
    import cloudpickle

    known = cloudpickle.Pickler.dispatch_table

    def reduce_code(code: types.CodeType) -> Any:
        file = code.co_filename
        lines = [] if os.path.exists(file) else linecache.getlines(file)
        return _code_of, (file, lines, *known[types.CodeType](code)[:2])

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table: ClassVar[Any] = collections.ChainMap({types.CodeType: reduce_code}, known)

    return Pickler


def _code_of(file: str, lines: list[str], make: Any, arguments: tuple[Any, ...]) -> types.CodeType:
    """Return a code object of a file; ``lines`` where only the writer has them: a cell's."""
    if lines:
        linecache.cache[file] = (sum(map(len, lines)), None, lines, file)
    code: types.CodeType = make(*arguments)
    return code.replace(co_filename=file)


def _write_at(fd: int, content: memoryview, offset: int) -> int:
    """Write all of the content at an offset; return the offset behind it."""
    while content:
        written = os.pwrite(fd, content, offset)
        content, offset = content[written:], offset + written
    return offset
