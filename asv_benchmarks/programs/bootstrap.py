"""Bootstrap of a linear regression: the coefficients of many resampled data sets."""

from __future__ import annotations

from typing import Any

import numpy as np

from programs.mapped import GOALS, Work, neighbours, share
from programs.program import Program

__all__ = ["PROGRAM"]


def make(rows: int, columns: int, resamples: int) -> Work:
    """Draw the data; an item is the seed of a resample."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((rows, columns))
    y = x @ rng.standard_normal(columns) + rng.standard_normal(rows)

    def coefficients(seed: int) -> Any:
        chosen = np.random.default_rng(seed).integers(len(x), size=len(x))
        a, b = x[chosen], y[chosen]
        return np.linalg.solve(a.T @ a, a.T @ b)

    return Work(coefficients, range(resamples))


PROGRAM = Program(
    "bootstrap",
    "bootstrap of a regression, {resamples} resamples of {rows} x {columns} float64",
    {"rows": 5000, "columns": 20, "resamples": 200},
    make,
    neighbours(),  # no prange: its random numbers, hence its resamples, would be others
    "resample",
    lambda sizes: sizes["resamples"],
    np.stack,
    1e-9,
    GOALS,
    share,
)
