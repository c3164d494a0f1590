"""Protocol of the workers: commands and answers as JSON lines, and the inputs of an all-reduce.

A command of an all-reduce is ``{"count", "dtype", "iterations"}``, an answer
``{"seconds", "wrong", "note"}``; ``wrong`` is the number of elements that differ from NumPy's sum.
Runs without dvkernels: workers run in environments of their own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["claim_stdout", "commands", "inputs", "portions", "steady"]


def claim_stdout() -> Any:
    """Return a function that writes answers to stdout; redirect all other output to stderr."""
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
    """Return the random input of every rank, shape (count,), the same in every process."""
    rng = np.random.default_rng(7)
    return [rng.integers(-4, 5, count, dtype=np.int8).astype(dtype) for _ in range(num_ranks)]


def steady(count: int, num_ranks: int, dtype: str) -> list[np.ndarray[Any, Any]]:
    """Return inputs for as many sums in place as ``portions`` allows.

    Values never become infinite or zero, which would be written twice as fast.
    """
    found = inputs(count, num_ranks, dtype)
    for array in found:
        array[array == 0] = 1
        array *= array.dtype.type(2.0**-50)
    return found


def portions(iterations: int, num_ranks: int) -> Iterator[int]:
    """Split ``iterations`` into numbers of calls between which the inputs must be renewed."""
    most = max(1, int(90 / math.log2(max(2, num_ranks))))
    for done in range(0, iterations, most):
        yield min(most, iterations - done)
