"""The checks of what users pass to a dataset, once."""

from __future__ import annotations

import operator

from dvkernels.errors import DatasetError
from dvkernels.user_errors import shown

__all__ = ["LARGEST", "check_callable", "check_count"]

# The largest number of elements that an index of 64 bits and the shuffle can address.
LARGEST = 2**62


def check_count(member: str, name: str, value: object, minimum: int, remedy: str = "") -> int:
    """Return ``value`` as an int of at least ``minimum``, else raise :class:`DatasetError`."""
    wanted = "a non-negative integer" if minimum == 0 else f"an integer of at least {minimum}"
    ending = f"; {remedy}" if remedy else ""
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise DatasetError(
            f"{member}: expected {name} to be {wanted}; got {value!r}, "
            f"a {type(value).__name__}{ending or '; pass an int'}"
        )
    if count < minimum:
        raise DatasetError(
            f"{member}: expected {name} to be {wanted}; got {count}"
            f"{ending or f'; pass {minimum} or more'}"
        )
    return count


def check_callable(member: str, value: object, remedy: str) -> None:
    """Raise :class:`DatasetError` unless ``value`` can be called."""
    if not callable(value):
        raise DatasetError(
            f"{member}: expected a function; got {shown(value)}, a {type(value).__name__}; {remedy}"
        )
