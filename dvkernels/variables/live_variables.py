"""Variables that are still alive: those of a strategy, and the memory that all of them take."""

from __future__ import annotations

from collections.abc import Iterator

from dvkernels.profiler import memory_report
from dvkernels.values.placement import Placement
from dvkernels.variables.variable import Variable, alive, storage_of

__all__: list[str] = []


def variables_of(placement: Placement) -> list[Variable]:
    """Return the variables of a strategy that are still alive."""
    return [variable for variable in list(alive.values()) if variable.owner is placement]


def _memory_usage() -> Iterator[tuple[str, str, int]]:
    for variable in list(alive.values()):
        copies = storage_of(variable)
        owner = "slots" if copies.is_slot else "variables"
        for device, array in zip(variable.devices, copies.arrays, strict=True):
            yield str(device), owner, array.nbytes
        if copies.has_scratch:
            yield str(variable.devices[0]), "workspaces", copies.arrays[0].nbytes


memory_report.register_account(_memory_usage)
