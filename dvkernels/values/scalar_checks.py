"""Checks of the scalars that users pass: replica ids and axes, weights and learning rates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__: list[str] = []


def is_integer(value: object) -> bool:
    """Return whether a value is a Python or NumPy integer, and not a bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def real(value: Any) -> float:
    """Return a real number of any type as a float; NaN for anything else.

    An array of one element counts as that element. Masked arrays and strings give NaN.
    """
    try:
        if isinstance(value, (str, bytes, np.ma.MaskedArray)):
            return math.nan
        is_single = getattr(value, "size", 0) == 1 and value.ndim
        return float(value.item() if is_single else value)
    except (TypeError, ValueError, OverflowError, AttributeError, RuntimeError):
        return math.nan
