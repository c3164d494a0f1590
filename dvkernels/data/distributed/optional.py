"""A batch, or the lack of one."""

from __future__ import annotations

from typing import Any

from dvkernels.errors import DatasetError

__all__ = ["DistributedOptional"]


class DistributedOptional:
    """A batch, or the lack of one at the end of an epoch."""

    __slots__ = ("_held",)

    def __init__(self, *held: Any) -> None:
        self._held = held

    def has_value(self) -> bool:
        """Tell whether there is a batch."""
        return bool(self._held)

    def get_value(self) -> Any:
        """Return the batch; :class:`DatasetError` if there is none."""
        if not self._held:
            raise DatasetError(
                "get_value: expected a batch; got none, the epoch is over; ask has_value() first"
            )
        return self._held[0]

    def __repr__(self) -> str:
        return f"DistributedOptional({repr(self._held[0]) if self._held else ''})"
