"""What a buffer holds: its shape and its dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__: list[str] = []


class Spec(NamedTuple):
    """Shape and dtype, written as ``float32[2, 3]`` in messages."""

    shape: tuple[Any, ...]
    dtype: Any

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(length) for length in self.shape)}]"

    def __repr__(self) -> str:
        return str(self)


def spec(array: Any) -> Spec:
    """Return what an array holds."""
    return Spec(array.shape, array.dtype)
