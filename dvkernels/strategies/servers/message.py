"""Message between processes: one pickle, arrays beside it as they are, and objects by reference.

An object that belongs to the job and not to one process (a variable, an optimizer, the strategy) is
sent as a reference, which each process resolves to what it has for it: a server to its rows, a
worker to a variable whose rows are on the servers.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dvkernels.devices.array_spec import HostArray

__all__: list[str] = []

_MIN_NBYTES = 1 << 12  # of an array beside the pickle
_ALIGNMENT = 64
_PADDING = memoryview(bytes(_ALIGNMENT))


class References(Protocol):
    """Objects that are sent by reference."""

    def reference_of(self, value: Any) -> tuple[Any, ...] | None:
        """Return the reference of an object; None for one that is sent by value."""

    def resolve(self, reference: tuple[Any, ...]) -> Any:
        """Return what this process has for a reference."""


def encode(
    value: Any, references: References, number: int = 0, kept: list[Any] | None = None
) -> list[memoryview]:
    """Return the parts of a message, with a number that can be read alone.

    Large arrays are not copied: they must not change meanwhile. Functions and
    classes of the main program are sent by cloudpickle. What is sent by reference is appended to
    ``kept``.
    """
    buffers: list[memoryview] = []

    def stays_inside(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _MIN_NBYTES:
            return True
        buffers.append(view)
        return False

    content = io.BytesIO()
    _pickler_class()(content, references, stays_inside, kept).dump(value)
    pickled = content.getbuffer()
    sizes = [pickled.nbytes, *(buffer.nbytes for buffer in buffers)]
    head = np.array([number, len(sizes), *sizes], np.int64)
    parts = []
    for part in (memoryview(head.tobytes()), pickled, *buffers):
        parts += [part, _PADDING[: -part.nbytes % _ALIGNMENT]]
    return parts


def nbytes_of(parts: Sequence[memoryview]) -> int:
    """Return the bytes of a message."""
    return sum(part.nbytes for part in parts)


def owned(parts: Sequence[memoryview]) -> list[memoryview]:
    """Return the same message, which no array shares."""
    return [memoryview(b"".join(parts))]


def number_of(message: HostArray) -> int:
    """Return the number of a message."""
    return int(message[:8].view(np.int64)[0])


def decode(message: HostArray, references: References) -> Any:
    """Return the value of a message. Its arrays share the bytes of the message."""
    count = int(message[8:16].view(np.int64)[0])
    sizes = message[16 : 16 + 8 * count].view(np.int64).tolist()
    offset, parts = _after(16 + 8 * count), []
    for nbytes in sizes:
        parts.append(message[offset : offset + nbytes])
        offset = _after(offset + nbytes)
    return _Unpickler(io.BytesIO(parts[0].data), references, parts[1:]).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, references: References, buffers: list[HostArray]) -> None:
        super().__init__(file, buffers=buffers)
        self._references = references

    def persistent_load(self, pid: Any) -> Any:
        return self._references.resolve(pid)


@functools.cache
def _pickler_class() -> Any:
    import cloudpickle  # when it is needed

    class ReferencePickler(cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(
            self, file: Any, references: References, stays_inside: Any, kept: list[Any] | None
        ) -> None:
            super().__init__(file, protocol=5, buffer_callback=stays_inside)
            self._references = references
            self._kept = kept

        def persistent_id(self, each: Any) -> Any:
            reference = self._references.reference_of(each)
            if reference is not None and self._kept is not None:
                self._kept.append(each)
            return reference

    return ReferencePickler


def _after(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
