"""Comparison of TensorFlow's answers with those of dvkernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from oracle_programs import decoded

# A mean may be a sum times 1/n or a sum over n, and a sum may be taken in any order.
TOLERANCE = 1e-6


class Case(NamedTuple):
    """The first operation of a program with different answers."""

    program: dict[str, Any]
    operation: dict[str, Any]
    before: list[str]
    theirs: dict[str, Any]
    ours: dict[str, Any]

    @property
    def modes(self) -> tuple[str, str]:
        variable = self.program["variable"]
        return variable["synchronization"], variable["aggregation"]


def differing(
    program: dict[str, Any], theirs: list[dict[str, Any]], ours: list[dict[str, Any]]
) -> Iterator[Case]:
    """Yield the operations with different answers, up to the first that leaves different copies."""
    before: list[str] = []
    operations = [{"op": "create", "context": "cross"}, *program["operations"]]
    # Each ends with its first error, so the end of the longer one is not compared.
    for operation, one, other in zip(operations, theirs, ours, strict=False):
        if not same_outcome(one, other):
            yield Case(program, operation, before, one, other)
        if "error" in one or "error" in other or not same(one["copies"], other["copies"]):
            return
        before = other["copies"]


def same_outcome(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Return whether two outcomes are equal; of errors, whether ``except`` theirs catches ours."""
    if "error" in theirs or "error" in ours:
        return theirs.get("error") in ours.get("error", ())
    return same(theirs["result"], ours["result"]) and same(theirs["copies"], ours["copies"])


def same(theirs: Any, ours: Any) -> bool:
    """Return whether two pytrees are equal."""
    if isinstance(theirs, str) and isinstance(ours, str):
        return close(decoded(theirs), decoded(ours))
    if type(theirs) is not type(ours):
        return False
    if isinstance(theirs, list):
        return len(theirs) == len(ours) and all(map(same, theirs, ours))
    if isinstance(theirs, dict):
        return theirs.keys() == ours.keys() and all(same(theirs[k], ours[k]) for k in theirs)
    return theirs == ours


def close(one: np.ndarray, other: np.ndarray) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    return bool(np.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True))
