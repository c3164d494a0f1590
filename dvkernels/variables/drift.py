"""Drift checks of debug mode: comparison of copies that should be equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dvkernels.communicators.base import Workers
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array, HostArray
from dvkernels.errors import DriftError
from dvkernels.profiler import debugging
from dvkernels.variables.modes import VariableSynchronization
from dvkernels.variables.variable import Variable, copies_of

__all__: list[str] = []


def check(variables: Iterable[Variable], workers: Workers, when: str) -> None:
    """Raise ``DriftError`` unless the copies of ON_WRITE variables are equal, on all workers."""
    alike = [v for v in variables if v.synchronization is VariableSynchronization.ON_WRITE]
    for variable in alike:
        compare(f"variable {variable.name!r} {when}", copies_of(variable))
    if workers.size == 1:
        return
    own = {}
    for variable in alike:
        bits = _bits(_on_host(copies_of(variable)[0]))
        own[variable.name] = hashlib.blake2b(bits, digest_size=16).hexdigest()
    first, *others = workers.exchange(own)
    for worker, other in enumerate(others, start=1):
        drifted = sorted(name for name in first.keys() & other if first[name] != other[name])
        if drifted:
            raise DriftError(
                f"{when}: worker {worker} holds other content than worker 0 in variables "
                f"{drifted}; every worker must make the same writes and updates"
            )


def compare(what: str, copies: Sequence[Array]) -> None:
    """Raise ``DriftError`` unless all copies are bitwise equal, and ``NonFiniteError`` for NaN."""
    first, *others = map(_on_host, copies)
    debugging.check_finite(what, [first])
    for replica, other in enumerate(others, start=1):
        differs = _bits(first) != _bits(other)
        if differs.any():
            rows = differs.reshape(-1, first.dtype.itemsize).any(axis=1)
            k = int(np.flatnonzero(rows)[0])
            raise DriftError(
                f"{what}: the copy of replica {replica} differs from that of replica 0 in "
                f"{int(rows.sum())} of {first.size} elements, first in element {k}: "
                f"{other.reshape(-1)[k]} instead of {first.reshape(-1)[k]}; a function given to "
                f"update must do the same to every copy"
            )


def _on_host(array: Array) -> HostArray:
    host: HostArray = array_memory.holding(array).to_host(array)
    return host


def _bits(array: HostArray) -> Any:
    return array.reshape(-1).view(np.uint8)
