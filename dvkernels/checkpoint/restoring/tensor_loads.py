"""Loads of a restore: the arrays of the program that each saved tensor is read into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dvkernels.checkpoint.format.manifest import TensorEntry
from dvkernels.checkpoint.format.shards import DTYPES
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array, HostArray, Spec
from dvkernels.errors import CheckpointError
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization
from dvkernels.variables.saved_variable import assign_first_copy
from dvkernels.variables.variable import Variable, storage_of

__all__: list[str] = []


class TensorLoads:
    """Loads of tensors into variables and arrays, and into new arrays.

    Attributes
    ----------
    staged : dict of str to array
        New arrays, by tensor, that become part of states: read before any object changes.
    targets : dict of str to list of array
        The target arrays of each tensor, all contiguous and in host memory.
    finish : list of callable
        Called after the loads; they change arrays only, and may be repeated with the loads.
    """

    def __init__(self, tensors: Mapping[str, TensorEntry]) -> None:
        self._tensors = tensors
        self._filled_from: dict[int, tuple[str, ...]] = {}  # tensors by the id of their target
        self.staged: dict[str, HostArray] = {}
        self.targets: dict[str, list[HostArray]] = {}
        self.finish: list[Callable[[], object]] = []

    def stage(self, name: str) -> HostArray:
        """Return a new array into which a tensor will be read."""
        entry = self._tensors[name]
        if name not in self.staged:
            try:
                self.staged[name] = np.empty(entry.shape, DTYPES[entry.dtype])
            except (MemoryError, ValueError) as error:
                raise CheckpointError(f"{name}: {error}") from error
        return self.staged[name]

    def fills(self, variable: Variable) -> bool:
        """Return whether a variable is a target."""
        return id(variable) in self._filled_from

    def fill(self, target: Variable | HostArray, names: tuple[str, ...], path: str) -> None:
        """Plan which tensor is loaded into each copy of a variable, or into an array."""
        variable = target if isinstance(target, Variable) else None
        label = path if variable is None else f"{path}: variable {variable.name!r}"
        for name in names:
            _check_spec(label, target, self._tensors[name])
        previous = self._filled_from.get(id(target))
        if previous is not None:
            if previous == names or self._are_equal([*previous, *names]):
                return
            raise CheckpointError(
                f"{label} has two paths here, and two different tensors are saved for them, "
                f"{previous[0]!r} and {names[0]!r}; restore into separate objects"
            )
        self._filled_from[id(target)] = names
        copies: list[Any] = [target]
        num_copies = 1
        if variable is not None:
            copies, num_copies = self._arrays_to_fill(variable), variable.owner.num_replicas
        if len(names) == 1:
            self._load(names[0], copies)
            if variable is not None and _is_shared_out(variable):
                self.finish.append(functools.partial(assign_first_copy, variable))
        elif variable is not None and _has_own_copies(variable) and len(names) == num_copies:
            first = variable.owner.first_replica  # of this process
            for name, array in zip(names[first:], copies, strict=False):
                self._load(name, [array])
        elif self._are_equal(names):
            self._load(names[0], copies)
        else:
            kind = variable is not None and _has_own_copies(variable)
            raise CheckpointError(
                f"{label}: {len(names)} copies that differ were saved, one per replica; here "
                f"there are {num_copies} {'copies' if kind else 'that must be equal'}; restore on "
                f"{len(names)} replicas, or make the copies equal (v.sync()) before saving"
            )

    def _arrays_to_fill(self, variable: Variable) -> list[Any]:
        """Return the copies; where nobody can write them, arrays of which they are made anew."""
        if variable.owner.make_copies is not None:  # it lies in other processes
            content = np.empty(variable.shape, variable.dtype)
            self.finish.append(functools.partial(variable.assign, content))
            return [content]
        storage = storage_of(variable)
        if not storage.memory.is_immutable:
            return list(storage.arrays)
        staging = [np.empty(array.shape, array.dtype) for array in storage.arrays]
        self.finish.append(functools.partial(storage.commit, staging))
        return [*staging]

    def _are_equal(self, names: Sequence[str]) -> bool:
        return len({self._tensors[name].checksums for name in names}) == 1

    def _load(self, name: str, targets: Sequence[Array]) -> None:
        memory = array_memory.holding(targets[0])
        if not all(map(memory.is_writable, targets)):
            raise CheckpointError(
                f"{name}: the array to restore into is read-only; make it writable"
            )
        direct = [
            target
            for target in targets
            if isinstance(target, np.ndarray) and target.flags.c_contiguous
        ]
        if len(direct) < len(targets):  # on a GPU, or not contiguous
            staging = np.empty(targets[0].shape, targets[0].dtype)
            sources = [staging] * len(targets)
            self.finish.append(functools.partial(memory.overwrite, targets, sources))
            direct = [staging]
        self.targets.setdefault(name, []).extend(direct)


def _check_spec(label: str, target: Variable | HostArray, entry: TensorEntry) -> None:
    dtype = DTYPES[entry.dtype]
    if target.shape != entry.shape or target.dtype != dtype:
        raise CheckpointError(
            f"{label}: expected {Spec(target.shape, target.dtype)}; the checkpoint holds "
            f"{Spec(entry.shape, dtype)}; restore into an object of that shape and dtype, or leave "
            f"it out"
        )


def _has_own_copies(variable: Variable) -> bool:
    return variable.synchronization is not VariableSynchronization.ON_WRITE


def _is_shared_out(variable: Variable) -> bool:
    """Return whether a value is shared out over the copies, which are then summed when read."""
    return (
        variable.synchronization is VariableSynchronization.ON_READ
        and variable.aggregation is VariableAggregation.SUM
    )
