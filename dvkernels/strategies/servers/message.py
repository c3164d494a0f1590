"""Message between processes of a job: a pickled value, and objects by reference.

An object that belongs to the job and not to one process (a variable, an optimizer, the strategy) is
sent as a reference, which each process resolves to what it has for it: a server to its rows, a
worker to a variable whose rows are on the servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from dvkernels import pickling
from dvkernels.devices.array_spec import HostArray

__all__: list[str] = []

_MIN_NBYTES = 1 << 12  # of an array beside the pickle


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

    Large arrays are not copied: they must not change meanwhile. What is sent by reference is
    appended to ``kept``.
    """
    reference_of = references.reference_of
    if kept is None:
        return pickling.encode(value, number, _MIN_NBYTES, reference_of)

    def noted(each: Any) -> tuple[Any, ...] | None:
        reference = reference_of(each)
        if reference is not None:
            kept.append(each)
        return reference

    return pickling.encode(value, number, _MIN_NBYTES, noted)


def nbytes_of(parts: Sequence[memoryview]) -> int:
    """Return the bytes of a message."""
    return sum(part.nbytes for part in parts)


def owned(parts: Sequence[memoryview]) -> list[memoryview]:
    """Return the same message, which no array shares."""
    return [memoryview(b"".join(parts))]


def decode(message: HostArray, references: References) -> Any:
    """Return the value of a message. Its arrays share the bytes of the message."""
    return pickling.decode(message.data, references.resolve)
