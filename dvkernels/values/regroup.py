"""From one nest per replica to one nest of values, and back.

A nest is what optree can flatten: lists, tuples, dicts, namedtuples, registered dataclasses.
None is a leaf, so that it stays where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree

from dvkernels import nest
from dvkernels.devices.base import Device
from dvkernels.errors import ContextError
from dvkernels.values.distributed import DistributedValues, Mirrored, PerReplica
from dvkernels.values.placement import Placement

__all__: list[str] = []


def flatten(nest: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a nest and its structure."""
    leaves, structure = optree.tree_flatten(nest, none_is_leaf=True)
    return leaves, structure


def unflatten(structure: Any, leaves: Sequence[Any]) -> Any:
    """Return the nest of this structure with these leaves."""
    return optree.tree_unflatten(structure, leaves)


def map_leaves(fn: Callable[[Any], Any], nest: Any) -> Any:
    """Return the nest with ``fn`` applied to every leaf."""
    return optree.tree_map(fn, nest, none_is_leaf=True)


def own_component(value: Any, rank: int, placement: object) -> Any:
    """Return what a leaf means to one local replica: its component of a distributed value.

    One of another strategy than that of the ``placement``, or of other replicas, raises.
    """
    if not isinstance(value, DistributedValues):
        return value
    check_own(value, placement)
    # A variable that has a single copy is the same to all replicas.
    return value.at(0 if len(value.values) == 1 and _is_variable(value) else rank)


def check_own(value: DistributedValues[Any], placement: object, what: str = "") -> None:
    """Raise ContextError unless there is a component for each local replica of a strategy."""
    if not isinstance(placement, Placement):
        return
    owner, count, is_variable = value.owner, len(value.values), _is_variable(value)
    is_anywhere = is_variable and (placement.is_default or getattr(owner, "is_default", False))
    if isinstance(owner, Placement) and not owner.is_of(placement) and not is_anywhere:
        whose = f" of {owner.name}"
    elif count != placement.num_local and not is_variable:
        whose = ""
    else:
        return
    raise ContextError(
        f"{what}expected a value for each of the {placement.num_local} replicas of "
        f"{placement.name}, got a {type(value).__name__} of {count} values{whose}"
    )


def regroup(
    results: Sequence[Any],
    devices: tuple[Device, ...],
    owner: object,
    kind: type[PerReplica[Any]] | type[Mirrored[Any]] = PerReplica,
) -> Any:
    """Return one nest whose leaves are of ``kind``, from one nest per replica.

    A leaf that is None on every replica stays None; a variable that every replica returned is
    returned as it is, being a distributed value already. Structures that differ raise ValueError.
    """
    first = results[0]
    if first is None and all(result is None for result in results):
        return None
    flat = [flatten(result) for result in results]
    structure = flat[0][1]
    named = owner.first_replica if isinstance(owner, Placement) else 0
    for replica, (_, other) in enumerate(flat, named):
        if other != structure:
            raise ValueError(
                f"the replicas returned different structures: replica {named} returned "
                f"{nest.words_of(structure)}, replica {replica} returned "
                f"{nest.words_of(other)}; return the same nest on every replica"
            )

    def joined(leaves: tuple[Any, ...]) -> Any:
        first = leaves[0]
        if (first is None or _is_variable(first)) and all(leaf is first for leaf in leaves):
            return first
        return kind(
            [own_component(leaf, rank, owner) for rank, leaf in enumerate(leaves)],
            devices=devices,
            owner=owner,
        )

    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return unflatten(structure, [joined(column) for column in columns])


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, DistributedValues) and not isinstance(leaf, PerReplica | Mirrored)
