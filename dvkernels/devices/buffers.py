"""What a buffer holds: its shape and its dtype; and what no buffer can hold: a mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dvkernels.errors import NotABufferError

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


def refuse_masked(value: Any, what: str) -> None:
    """Raise NotABufferError where ``np.asarray(value)`` would drop a mask; ``what`` is its name.

    Also for lists and tuples of masked arrays.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise NotABufferError(
            f"{what} is a MaskedArray, whose mask would be ignored; pass .filled(value) or .data"
        )
    if isinstance(value, (list, tuple)) and _holds_masked(value, 0):
        raise NotABufferError(
            f"{what} holds a MaskedArray, whose mask would be ignored; pass .filled(value) or .data"
        )


def _holds_masked(value: Any, depth: int) -> bool:
    if isinstance(value, (list, tuple)):  # no array has more axes than 64
        return depth < 64 and any(_holds_masked(one, depth + 1) for one in value)
    return isinstance(value, np.ma.MaskedArray)
