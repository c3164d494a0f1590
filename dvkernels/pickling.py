"""Pickling: messages of a pickle with large arrays beside it, and errors that can be sent.

A message is a number that can be read alone, the sizes of its parts, a pickle of cloudpickle's, and
the arrays as they are (out-of-band buffers of PEP 574), each part on a boundary of 64 bytes. So who
reads it shares the memory of the message instead of copying arrays.

Code keeps the name of its file, for tracebacks, and takes its lines along if they are in no file,
such as those of a notebook's cell.
"""

from __future__ import annotations

import copyreg
import functools
import io
import linecache
import os
import pickle
import struct
import types
from collections.abc import Callable
from typing import Any, ClassVar

from dvkernels import user_errors

__all__: list[str] = []

_ALIGNMENT = 64  # of arrays: a line of the caches, as NumPy's own
_HEAD = struct.Struct("<qq")  # number, count of the parts; their sizes follow
HEAD_NBYTES = _HEAD.size
_FILENAME = 10  # its position among the arguments of ``types.CodeType``
_PADDING = memoryview(bytes(_ALIGNMENT))


def encode(
    value: Any, number: int, min_nbytes: int, reference_of: Callable[[Any], Any] | None = None
) -> list[memoryview]:
    """Return a message, in pieces; arrays of at least ``min_nbytes`` are not copied.

    Objects for which ``reference_of`` returns something else than None are sent as that.
    """
    parts = [_PADDING]  # the pickle's place

    def stays_inside(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < min_nbytes:
            return True
        parts.append(view)
        return False

    content = io.BytesIO()
    pickler = _pickler_class()(content, 5, stays_inside)
    if reference_of is not None:
        pickler.persistent_id = reference_of
    pickler.dump(value)
    parts[0] = memoryview(content.getvalue())  # collecting a cycle with getbuffer() may crash
    head = struct.pack(f"<{len(parts) + 2}q", number, len(parts), *(part.nbytes for part in parts))
    pieces = []
    for piece in (memoryview(head), *parts):
        pieces += [piece, _PADDING[: -piece.nbytes % _ALIGNMENT]]
    return pieces


def number_of(message: Any) -> int:
    """Return the number of a message, given as anything with a buffer."""
    return int(_HEAD.unpack_from(message)[0])


def decode(message: memoryview, resolve: Callable[[Any], Any] | None = None) -> Any:
    """Return the value of a message. Its arrays share the bytes of the message."""
    _, count = _HEAD.unpack_from(message)
    offset = _HEAD.size + 8 * count
    parts = []
    for nbytes in struct.unpack_from(f"<{count}q", message, _HEAD.size):
        offset += -offset % _ALIGNMENT
        parts.append(message[offset : offset + nbytes])
        offset += nbytes
    if resolve is None:
        return pickle.loads(parts[0], buffers=parts[1:])
    unpickler = _Unpickler(io.BytesIO(parts[0]), buffers=parts[1:])
    unpickler.persistent_load = resolve  # type: ignore[method-assign]
    return unpickler.load()


def can_be_sent(error: BaseException) -> bool:
    """Return whether who gets an error by a message gets one of its class."""
    try:
        message = memoryview(b"".join(encode(error, 0, 0)))
        return type(decode(message)) is type(error)
    except KeyboardInterrupt:
        raise
    except BaseException:  # its class may do anything
        return False


def sendable(error: BaseException) -> BaseException:
    """Return an error, or if it cannot be sent another with its class name, text and last note."""
    if can_be_sent(error):
        return error
    made = RuntimeError(f"{user_errors.describe(error)} (an error that cannot be sent)")
    if note := user_errors.latest_note(error):
        made.add_note(note)
    return made


class _Unpickler(pickle.Unpickler):
    """Unpickler whose ``persistent_load`` may be set, which Python 3.13 refuses its base class."""


@functools.cache
def _pickler_class() -> Any:
    """Return cloudpickle's pickler, but code keeps the names of its files, for tracebacks."""
    import cloudpickle  # when it is needed

    known = cloudpickle.Pickler.dispatch_table.maps[0]

    def reduce_code(code: types.CodeType) -> Any:
        file = code.co_filename
        _, arguments, *_ = known[types.CodeType](code)
        arguments = (*arguments[:_FILENAME], file, *arguments[_FILENAME + 1 :])
        lines = [] if os.path.exists(file) else linecache.getlines(file)
        return (_code_of, (file, lines, arguments)) if lines else (types.CodeType, arguments)

    class Reducers(dict[type, Any]):
        """Reducers by class; one that is missing is found in half of a ``ChainMap``'s time."""

        def __missing__(self, kind: type) -> Any:
            return known.get(kind) or copyreg.dispatch_table[kind]

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table: ClassVar[Any] = Reducers({types.CodeType: reduce_code})

    return Pickler


def _code_of(file: str, lines: list[str], arguments: tuple[Any, ...]) -> types.CodeType:
    """Return a code object whose file only the writer has, as that of a cell, with its lines."""
    linecache.cache[file] = (sum(map(len, lines)), None, lines, file)
    return types.CodeType(*arguments)
