"""Regrouping of one pytree per replica to one pytree of distributed values, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from dvkernels import pytree
from dvkernels.devices.device import Device
from dvkernels.errors import ContextError
from dvkernels.values.distributed import DistributedValues, Mirrored, PerReplica
from dvkernels.values.placement import Placement

__all__: list[str] = []

PLAIN = frozenset({np.ndarray, float, int, bool, np.float32, np.float64})  # leaves of any pytree
_NONE = {type(None)}


def own_component(value: Any, rank: int, placement: Placement) -> Any:
    """Return the component of a leaf for one local rank; a plain leaf is returned as it is.

    A distributed value of another strategy, or of another number of replicas, raises
    ``ContextError``. Only the replica outside every scope reads variables of all strategies: as in
    their cross-replica context.
    """
    if not isinstance(value, DistributedValues):
        return value
    if placement.is_default and is_variable(value) and value.owner is not placement:
        variable: Any = value  # of a class above this module
        return variable.read_value()
    check_fits(value, placement)
    # All replicas read the only copy of a variable in central storage.
    return value.at(0 if len(value.values) == 1 and is_variable(value) else rank)


def check_fits(value: DistributedValues[Any], placement: Placement, what: str = "") -> None:
    """Raise ``ContextError`` unless a value has one component per local replica of a strategy."""
    check_owner(value, placement, what)
    # A variable may have a single copy for all replicas.
    if len(value.values) != placement.num_local and not is_variable(value):
        _refuse(value, placement, what)


def check_owner(value: DistributedValues[Any], placement: Placement, what: str = "") -> None:
    """Raise ``ContextError`` if a value belongs to another strategy.

    Variables created outside every scope, those of the default strategy, are read by all.
    """
    owner = value.owner
    if owner is None or owner.is_of(placement) or (owner.is_default and is_variable(value)):
        return
    _refuse(value, placement, what, f" of {owner.name}")


def _refuse(
    value: DistributedValues[Any], placement: Placement, what: str, whose: str = ""
) -> NoReturn:
    raise ContextError(
        f"{what}expected a value for each of the {placement.num_local} replicas of "
        f"{placement.name}, got a {type(value).__name__} of {len(value.values)} values{whose}"
    )


def regroup(
    results: Sequence[Any],
    devices: tuple[Device, ...],
    owner: Placement,
    kind: type[PerReplica[Any]] | type[Mirrored[Any]] = PerReplica,
) -> Any:
    """Return one pytree whose leaves are of class ``kind``, from one pytree per replica.

    A leaf that is None on every replica stays None, and a variable that every replica returned
    stays that variable, which is a distributed value already. Different structures raise
    ``ValueError``.
    """
    kinds = {*map(type, results)}  # common cases, without the containers of a pytree
    if kinds == _NONE:
        return None
    if kinds <= PLAIN:
        return kind(results, devices=devices, owner=owner)
    flat = [pytree.flatten(result) for result in results]
    structure = flat[0][1]
    first_id = owner.first_replica
    for replica, (_, other) in enumerate(flat, first_id):
        if other != structure:
            raise ValueError(
                f"the replicas returned different structures: replica {first_id} returned "
                f"{pytree.describe_structure(structure)}, replica {replica} returned "
                f"{pytree.describe_structure(other)}; return the same structure on every replica"
            )

    def joined(leaves: tuple[Any, ...]) -> Any:
        first = leaves[0]
        if (first is None or is_variable(first)) and all(leaf is first for leaf in leaves):
            return first
        return kind(
            [own_component(leaf, rank, owner) for rank, leaf in enumerate(leaves)],
            devices=devices,
            owner=owner,
        )

    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return pytree.unflatten(structure, [joined(column) for column in columns])


def per_replica_component(tree: Any, rank: int, placement: Placement) -> Any:
    """Return a pytree with each ``PerReplica`` in it replaced by the component of one rank."""

    def component(leaf: Any) -> Any:
        is_distributed = isinstance(leaf, PerReplica)
        return own_component(leaf, rank, placement) if is_distributed else leaf

    return pytree.map_leaves(component, tree)


def is_variable(leaf: Any) -> bool:
    """Return whether a leaf is a variable, a class above this module."""
    return isinstance(leaf, DistributedValues) and not isinstance(leaf, PerReplica | Mirrored)
