"""Drift checks of debug mode: comparison of copies that should be equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dvkernels.communicators.base import Workers
from dvkernels.devices import array_memory
from dvkernels.errors import DriftError
from dvkernels.profiler import debugging
from dvkernels.variables.modes import VariableSynchronization
from dvkernels.variables.variable import Variable, copies_of

__all__: list[str] = []


def check(variables: Iterable[Variable], when: str) -> None:
    """Raise ``DriftError`` unless all copies of each ON_WRITE variable are equal and finite."""
    for variable in variables:
        if variable.synchronization is not VariableSynchronization.ON_WRITE:
            continue
        compare(f"variable {variable.name!r} {when}", copies_of(variable))


def check_over_workers(variables: Iterable[Variable], workers: Workers, when: str) -> None:
    """Raise ``DriftError`` on all workers unless their ON_WRITE variables are equal."""
    if workers.size == 1:
        return
    own = {
        variable.name: hashlib.blake2b(_bits(copies_of(variable)[0]), digest_size=16).hexdigest()
        for variable in variables
        if variable.synchronization is VariableSynchronization.ON_WRITE
    }
    first, *others = workers.exchange(own)
    for worker, other in enumerate(others, start=1):
        drifted = sorted(name for name in first.keys() & other if first[name] != other[name])
        if drifted:
            raise DriftError(
                f"{when}: worker {worker} holds other content than worker 0 in variables "
                f"{drifted}; every worker must make the same writes and updates"
            )


def compare(what: str, copies: Sequence[Any]) -> None:
    """Raise ``DriftError`` unless all copies are bitwise equal, and ``NonFiniteError`` for NaN."""
    first, *others = (array_memory.holding(copy).to_host(copy) for copy in copies)
    debugging.check_finite(what, [first])
    for replica, other in enumerate(others, start=1):
        if (_bits(first) != _bits(other)).any():
            _raise_drift(what, replica, first, other)


def _bits(array: Any) -> Any:
    return array.reshape(-1).view(np.uint8)


def _raise_drift(what: str, replica: int, first: Any, other: Any) -> None:
    itemsize = first.dtype.itemsize
    rows = (_bits(first).reshape(-1, itemsize) != _bits(other).reshape(-1, itemsize)).any(axis=1)
    k = int(np.flatnonzero(rows)[0])
    raise DriftError(
        f"{what}: the copy of replica {replica} differs from that of "
        f"replica 0 in {int(rows.sum())} of {first.size} elements, first in element {k}: "
        f"{other.reshape(-1)[k]} instead of {first.reshape(-1)[k]}; a function given to update "
        f"must do the same to every copy"
    )
