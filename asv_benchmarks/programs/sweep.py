"""Parameter sweep: coupled oscillators (Kuramoto's model) at many strengths of the coupling.

A compiled function that releases the interpreter's lock. It integrates until the order parameter is
steady, so the items take different times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from programs.mapped import GOALS, Work, neighbours, share
from programs.program import Program

__all__ = ["PROGRAM"]

STEP, STEADY, MOST_STEPS = 0.05, 1e-3, 400


@numba.njit(nogil=True)
def order_parameter(coupling, frequencies):  # type: ignore[no-untyped-def]
    """Return the length of the oscillators' mean in the complex plane, once it is steady."""
    phases = np.linspace(0, 2, frequencies.size)
    r, before = 0.0, -1.0
    for _ in range(MOST_STEPS):
        cosine, sine = np.cos(phases).mean(), np.sin(phases).mean()
        r, angle = np.hypot(cosine, sine), np.arctan2(sine, cosine)
        if abs(r - before) < STEADY * STEP:
            break
        before = r
        phases += STEP * (frequencies + coupling * r * np.sin(angle - phases))
    return r


@numba.njit(parallel=True)
def _in_parallel(couplings, frequencies):  # type: ignore[no-untyped-def]
    found = np.empty(couplings.size)
    for k in numba.prange(couplings.size):
        found[k] = order_parameter(couplings[k], frequencies)
    return found


def make(oscillators: int, couplings: int) -> Work:
    """Draw the frequencies; an item is a strength of the coupling."""
    frequencies = np.random.default_rng(3).standard_normal(oscillators)
    strengths = np.linspace(0, 4, couplings)

    def steady(coupling: float) -> float:
        found: float = order_parameter(coupling, frequencies)
        return found

    return Work(steady, list(strengths), (strengths, frequencies))


def prange(work: Work, count: int) -> Iterator[Callable[[], Any]]:
    """Loop over the items in compiled code."""
    yield lambda: _in_parallel(*work.data)


PROGRAM = Program(
    "sweep",
    "{couplings} strengths of the coupling of {oscillators} oscillators, compiled by Numba",
    {"oscillators": 500, "couplings": 64},
    make,
    neighbours(prange, _in_parallel),
    "item",
    lambda sizes: sizes["couplings"],
    np.asarray,
    1e-9,
    GOALS,
    share,
)
