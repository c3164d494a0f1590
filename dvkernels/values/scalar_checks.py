"""Single numbers that users pass: weights, rates and the like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__: list[str] = []


def real(value: Any) -> float:
    """Return a real number of any kind as a float; NaN for anything that is none.

    Arrays of one element count as that element, masked ones and strings as nothing.
    """
    try:
        if isinstance(value, (str, bytes, np.ma.MaskedArray)):
            return math.nan
        is_single = getattr(value, "size", 0) == 1 and value.ndim
        return float(value.item() if is_single else value)
    except (TypeError, ValueError, OverflowError, AttributeError, RuntimeError):
        return math.nan
