"""asv benchmarks of dvkernels, one module per subject.

``cd asv_benchmarks && asv run --python=same --quick``. Parameters are the same on every machine;
where a machine lacks a device or package, ``setup`` raises NotImplementedError, which asv shows as
n/a. Code is compiled in ``setup``, and every result is checked there, on random data. With
DVKERNELS_BENCH_TRIAL=1 each takes its first parameters and two rounds, which shows that it runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

__all__: list[str] = []

_IS_TRIAL = os.environ.get("DVKERNELS_BENCH_TRIAL") == "1"


def grid(*values: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """Return the values of each parameter; in a trial the first of them."""
    return tuple(each[:1] for each in values) if _IS_TRIAL else values


def rounds(number: int) -> int:
    """Return the number of rounds; in a trial two."""
    return min(number, 2) if _IS_TRIAL else number
