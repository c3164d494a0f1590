"""Copies that should be equal and are not: looked for in debug mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dvkernels.devices import memory
from dvkernels.errors import DriftError
from dvkernels.profiler import debugging
from dvkernels.variables.modes import VariableSynchronization
from dvkernels.variables.variable import Variable, copies_of

__all__: list[str] = []


def check(variables: Iterable[Variable], when: str) -> None:
    """Raise unless every copy of each ON_WRITE variable holds the same finite content."""
    for variable in variables:
        if variable.synchronization is not VariableSynchronization.ON_WRITE:
            continue
        compare(f"variable {variable.name!r} {when}", copies_of(variable))


def compare(what: str, copies: Sequence[Any]) -> None:
    """Raise unless all copies hold the same finite content."""
    first, *others = (memory.holding(copy).to_host(copy) for copy in copies)
    debugging.check_finite(what, [first])
    for replica, other in enumerate(others, start=1):
        if (_bits(first) != _bits(other)).any():
            _raise(what, replica, first, other)


def _bits(array: Any) -> Any:
    return array.reshape(-1).view(np.uint8)


def _raise(what: str, replica: int, first: Any, other: Any) -> None:
    itemsize = first.dtype.itemsize
    rows = (_bits(first).reshape(-1, itemsize) != _bits(other).reshape(-1, itemsize)).any(axis=1)
    k = int(np.flatnonzero(rows)[0])
    raise DriftError(
        f"{what}: the copy of replica {replica} differs from that of "
        f"replica 0 in {int(rows.sum())} of {first.size} elements, first in element {k}: "
        f"{other.reshape(-1)[k]} instead of {first.reshape(-1)[k]}; a function given to update "
        f"must do the same to every copy"
    )
