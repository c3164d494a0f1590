"""Enumerations that accept a member's name, in any case, wherever the member is accepted."""

from __future__ import annotations

import enum
from typing import Self

from dvkernels.errors import DvKernelsError

__all__: list[str] = []


class NamedEnum(enum.Enum):
    """Members whose values are their lower-case names, so that the value is a way to write them."""

    __hash__ = object.__hash__  # members are unique; hashing by name takes 0.3 us in Python

    @classmethod
    def of(cls, value: object, error: type[DvKernelsError] | type[ValueError] = ValueError) -> Self:
        """Return the member that ``value`` is or names; raise ``error``, listing all names."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value.upper() in cls.__members__:
            return cls[value.upper()]
        names = ", ".join(repr(member.value) for member in cls)
        raise error(f"expected a {cls.__name__} or one of the names {names}; got {value!r}")
