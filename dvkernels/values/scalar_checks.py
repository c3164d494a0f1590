"""Checks of the scalars that users pass: replica ids and axes, weights and learning rates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dvkernels.user_errors import brief

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


def within(number: Any, name: str, least: float, below: float = math.inf) -> float:
    """Return a setting as a float; raise ValueError unless it is in ``[least, below)``."""
    value = real(number)
    if not least <= value < below:
        limits = f"at least {least:g}" + (f" and below {below:g}" if below < math.inf else "")
        raise ValueError(f"{name} must be a finite number, {limits}; got {brief(number, 60)}")
    return value
