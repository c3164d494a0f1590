"""Optional batch: the result of ``get_next_as_optional``."""

from __future__ import annotations

from typing import Any

from dvkernels.errors import DatasetError

__all__ = ["DistributedOptional"]


class DistributedOptional:
    """Optional batch, which is empty at the end of an epoch."""

    __slots__ = ("_value",)

    def __init__(self, *value: Any) -> None:
        self._value = value

    def has_value(self) -> bool:
        """Return whether there is a batch."""
        return bool(self._value)

    def get_value(self) -> Any:
        """Return the batch; :class:`DatasetError` if there is none."""
        if not self._value:
            raise DatasetError(
                "get_value: expected a batch; got none, the epoch is over; ask has_value() first"
            )
        return self._value[0]

    def __repr__(self) -> str:
        return f"DistributedOptional({repr(self._value[0]) if self._value else ''})"
