"""Base class of enumerations whose members may be given by name, in any case."""

from __future__ import annotations

import enum
from typing import Self

from dvkernels.errors import DvKernelsError

__all__: list[str] = []


class NamedEnum(enum.Enum):
    """Enumeration whose members' values are their lower-case names."""

    __hash__ = object.__hash__  # members are unique; hashing by name takes 0.3 us in Python

    @classmethod
    def of(cls, value: object, error: type[DvKernelsError] | type[ValueError] = ValueError) -> Self:
        """Return the member that ``value`` is or names, else raise ``error`` with all names."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value.upper() in cls.__members__:
            return cls[value.upper()]
        names = ", ".join(repr(member.value) for member in cls)
        raise error(f"expected a {cls.__name__} or one of the names {names}; got {value!r}")
