"""Checks of the arguments that users pass to datasets."""

from __future__ import annotations

import inspect
import operator
from typing import Any

from dvkernels.errors import DatasetError
from dvkernels.user_errors import brief

__all__: list[str] = []

# The largest number of elements that the shuffle, on 64-bit integers, can address.
LARGEST = 2**62
# The largest index in an int64 array of indices.
LARGEST_INDEX = 2**63 - 1


def check_count(
    member: str,
    name: str,
    value: object,
    minimum: int,
    remedy: str = "",
    maximum: int = LARGEST_INDEX,
) -> int:
    """Return ``value`` as an int from ``minimum`` to ``maximum``, else raise ``DatasetError``."""
    wanted = "a non-negative integer" if minimum == 0 else f"an integer of at least {minimum}"
    ending = f"; {remedy}" if remedy else ""
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise unexpected(member, f"{name} to be {wanted}", value, remedy or "pass an int")
    if minimum <= count <= maximum:
        return count
    bits = count.bit_length()
    got = str(count) if bits < 256 else f"an integer of {bits} bits"  # Python prints no longer ones
    if count < minimum:
        reason = f"; got {got}{ending or f'; pass {minimum} or more'}"
    else:
        reason = f" and of at most {maximum.bit_length()} bits; got {got}{ending}"
    raise DatasetError(f"{member}: expected {name} to be {wanted}{reason}")


def unexpected(
    member: str, wanted: str, value: object, remedy: str, where: str = ""
) -> DatasetError:
    """Return the error for a value of the user's that is not as ``wanted``."""
    got = f"{brief(value)}, a {type(value).__name__}{where}"
    return DatasetError(f"{member}: expected {wanted}; got {got}; {remedy}")


def check_flag(member: str, name: str, value: object) -> None:
    """Raise :class:`DatasetError` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise DatasetError(f"{member}: expected {name} to be True or False; got {brief(value)}")


def check_callable(member: str, value: object, remedy: str) -> None:
    """Raise :class:`DatasetError` unless ``value`` is callable and not asynchronous."""
    if not callable(value):
        raise unexpected(member, "a function", value, remedy)
    if any(map(_is_asynchronous, _called(value))):
        raise DatasetError(
            f"{member}: expected a function that does its work when it is called; got "
            f"{brief(value)}, an async one, which is never awaited; write it without async"
        )


def check_function(member: str, value: object, remedy: str) -> None:
    """Raise :class:`DatasetError` unless ``value`` is callable, not asynchronous, no generator."""
    check_callable(member, value, remedy)
    if any(map(inspect.isgeneratorfunction, _called(value))):
        raise DatasetError(
            f"{member}: expected a function that returns; got {brief(value)}, which makes a "
            "generator of every element; write return instead of yield"
        )


def check_ordered(member: str, name: str, value: object) -> None:
    """Raise :class:`DatasetError` if ``value`` is a set, whose order differs between processes."""
    if isinstance(value, set | frozenset):
        raise DatasetError(
            f"{member}: expected {name} to have an order; got a {type(value).__name__}, whose "
            "order may differ between processes; pass sorted(...)"
        )


def _called(value: Any) -> tuple[object, ...]:
    return value, type(value).__call__


def _is_asynchronous(value: object) -> bool:
    return inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value)
