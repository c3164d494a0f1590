"""What the workers share: commands come as JSON lines, answers go back as JSON lines.

A command is ``{"nbytes", "dtype", "iterations"}``; the answer ``{"seconds", "wrong", "note"}``, of
which ``wrong`` counts elements that differ from NumPy's sum of the same random whole numbers.
Runs without dvkernels: workers live in environments of their own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["answers_go_to", "commands", "inputs", "portions", "steady"]


def answers_go_to() -> Any:
    """Return a function that answers; everything else that is printed goes to stderr."""
    stream = sys.stdout
    sys.stdout = sys.stderr

    def answer(**fields: Any) -> None:
        stream.write(json.dumps(fields) + "\n")
        stream.flush()

    return answer


def commands() -> Iterator[dict[str, Any]]:
    """Yield commands until the pipe is closed."""
    for line in sys.stdin:
        if line.strip():
            yield json.loads(line)


def inputs(count: int, num_ranks: int, dtype: str) -> list[np.ndarray[Any, Any]]:
    """Return every rank's random input, the same in every process."""
    rng = np.random.default_rng(7)
    return [rng.integers(-4, 5, count, dtype=np.int8).astype(dtype) for _ in range(num_ranks)]


def steady(count: int, num_ranks: int, dtype: str) -> list[np.ndarray[Any, Any]]:
    """Return inputs whose sum may be taken in place as often as ``portions`` allow.

    Neither zero (memory takes zeros twice as fast) nor infinite in between.
    """
    found = inputs(count, num_ranks, dtype)
    for array in found:
        array[array == 0] = 1
        array *= array.dtype.type(2.0**-50)
    return found


def portions(iterations: int, num_ranks: int) -> Iterator[int]:
    """Yield numbers of calls that add up to ``iterations``; between them inputs are renewed."""
    most = max(1, int(90 / math.log2(max(2, num_ranks))))
    for begun in range(0, iterations, most):
        yield min(most, iterations - begun)
