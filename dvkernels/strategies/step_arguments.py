"""Arguments of a compiled step: what is traced, placed on the devices, and what is constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dvkernels import pytree, user_errors
from dvkernels.communicators.jax import shard_map
from dvkernels.devices import interop, jax_arrays, jax_devices
from dvkernels.devices.array_spec import refuse_masked, spec
from dvkernels.errors import BufferMismatchError, NotABufferError
from dvkernels.values import regroup
from dvkernels.values.distributed import Mirrored, PerReplica, global_array_of
from dvkernels.values.placement import Placement

__all__: list[str] = []

TRACED = object()  # in the place of a leaf that is traced
_HOST = (np.ndarray, bool, int, float, complex, np.generic)


class StepArguments(NamedTuple):
    """Flattened arguments of a call: what is traced, and what is a constant of the program."""

    key: Any
    structure: pytree.Structure
    traced: tuple[Any, ...]  # global arrays
    constants: tuple[Any, ...]  # one for each leaf; a traced leaf has ``TRACED``

    def rebuilt(self, traced: Sequence[Any]) -> Any:
        """Return the arguments of the function, given the traced arrays."""
        values = iter(traced)
        leaves = [next(values) if each is TRACED else each for each in self.constants]
        return pytree.unflatten(self.structure, leaves)


def of(args: Sequence[Any], kwargs: Mapping[str, Any], placement: Placement) -> StepArguments:
    """Return the arguments of a call; parts of different shapes raise."""
    leaves, structure = pytree.flatten((tuple(args), dict(kwargs)))
    mesh, own = placement.mesh, placement.jax_local_devices
    constants: list[Any] = []
    pending: list[Any] = []  # what is put on devices
    places: list[Any] = []
    traced: list[Any] = []  # of each traced leaf its global array, or the number of its arrays
    keys: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, PerReplica):
            regroup.check_fits(leaf, placement, "run: ")
            values = leaf.values
            whole = global_array_of(leaf)
            if (
                whole is not None
                and leaf.owner is placement
                and not any(value.is_deleted() for value in values)  # XLA would crash
            ):
                traced.append(whole)
                constants.append(TRACED)
                keys.append(TRACED)
                continue
            if not all(map(_is_array, values)):
                values = _equal_constants(values)
                constants.append(values)
                keys.append(_constant_key(values))
                continue
            _check_even(values)
            pending.extend(values)
            places.extend(own)
            traced.append(len(own))
        else:
            value = leaf.values[0] if isinstance(leaf, Mirrored) else leaf
            if not _is_array(value):
                constants.append(value)
                keys.append(_constant_key(value))
                continue
            targets = places_of_one(mesh, own)
            pending.extend([value] * len(targets))
            places.extend(targets)
            traced.append(len(targets))
        constants.append(TRACED)
        keys.append(TRACED)
    placed = iter(_placed(pending, places))
    arrays = [
        whole_of([next(placed) for _ in range(each)], mesh) if type(each) is int else each
        for each in traced
    ]
    shapes = tuple(
        (array.shape, array.dtype, getattr(array, "weak_type", False)) for array in arrays
    )
    return StepArguments(
        (structure, tuple(keys), shapes), structure, tuple(arrays), tuple(constants)
    )


def places_of_one(mesh: Any, own: list[Any]) -> list[Any]:
    """Return where to put a value that is one for all: on all devices of this process.

    In one call if they are all; over several processes JAX would compare the value among them.
    """
    return [jax_devices.replicated(mesh)] if mesh.size == len(own) else own


def whole_of(arrays: list[Any], mesh: Any) -> Any:
    """Return the global array of arrays of the local devices, or of one that is global already.

    The latter stays weakly typed if it was a number of Python.
    """
    first = arrays[0]
    if mesh.size == 1 or (len(arrays) == 1 and first.sharding == jax_devices.replicated(mesh)):
        return first
    return shard_map.assembled(arrays, mesh)


def _placed(values: list[Any], places: list[Any]) -> list[Any]:
    """Return values on their devices; what lies there already costs no transfer."""
    moved = []
    for k, (value, place) in enumerate(zip(values, places, strict=True)):
        if isinstance(value, jax.Array):
            if value.committed and value.device == place:
                continue
        elif not isinstance(value, _HOST):  # of another library
            values[k] = interop.view("run of a compiled step", value, "an argument")
        moved.append(k)
    if moved:
        own = [jax_arrays.unshared(values[k]) for k in moved]
        new = jax.device_put(own, [places[k] for k in moved])
        for k, array in zip(moved, new, strict=True):
            values[k] = array
    return values


def _is_array(value: Any) -> bool:
    if isinstance(value, jax.Array):
        return True
    refuse_masked(value, "run of a compiled step: an argument")
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind not in "biufcV":
        raise NotABufferError(
            f"run of a compiled step: arrays of {value.dtype} cannot be traced; pass numbers, or "
            f"run the function itself, uncompiled"
        )
    return isinstance(value, _HOST) or interop.is_foreign(value)


def _check_even(values: Sequence[Any]) -> None:
    first = values[0]
    if isinstance(first, jax.Array):
        shape, dtype = first.shape, first.dtype
        if all(isinstance(v, jax.Array) and v.shape == shape and v.dtype == dtype for v in values):
            return
    specs = [spec(value) if hasattr(value, "shape") else type(value) for value in values]
    for replica, each in enumerate(specs):
        if each != specs[0]:
            raise BufferMismatchError(
                f"run of a compiled step: the parts of a PerReplica have one shape and dtype; "
                f"replica 0 has {specs[0]}, replica {replica} has {each}; drop the remainder "
                f"(drop_remainder=True), or pad the batches with InputOptions(pad=True), which "
                f"gives each row a weight, or run the function itself, uncompiled"
            )


def _equal_constants(values: Sequence[Any]) -> Any:
    first = values[0]
    for replica, value in enumerate(values):
        if value is not first and (type(value) is not type(first) or value != first):
            raise BufferMismatchError(
                f"run of a compiled step: what is no array is a constant of the program, and "
                f"replica {replica} has {user_errors.brief(value)}, replica 0 "
                f"{user_errors.brief(first)}; pass arrays, or run the function itself, uncompiled"
            )
    return first


def _constant_key(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value
