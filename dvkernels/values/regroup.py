"""Regrouping of one pytree per replica to one pytree of distributed values, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dvkernels import pytree
from dvkernels.devices.device import Device
from dvkernels.errors import ContextError
from dvkernels.values.distributed import DistributedValues, Mirrored, PerReplica
from dvkernels.values.placement import Placement

__all__: list[str] = []


def own_component(value: Any, rank: int, placement: object) -> Any:
    """Return the component of a leaf for one local rank; a plain leaf is returned as it is.

    A distributed value of another strategy, or of another number of replicas, raises
    ``ContextError``.
    """
    if not isinstance(value, DistributedValues):
        return value
    check_own(value, placement)
    # All replicas read the only copy of a variable in central storage.
    return value.at(0 if len(value.values) == 1 and _is_variable(value) else rank)


def check_own(value: DistributedValues[Any], placement: object, what: str = "") -> None:
    """Raise ``ContextError`` unless a value has one component per local replica of a strategy."""
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
    """Return one pytree whose leaves are of class ``kind``, from one pytree per replica.

    A leaf that is None on every replica stays None, and a variable that every replica returned
    stays that variable, which is a distributed value already. Different structures raise
    ``ValueError``.
    """
    first = results[0]
    if first is None and all(result is None for result in results):
        return None
    flat = [pytree.flatten(result) for result in results]
    structure = flat[0][1]
    first_id = owner.first_replica if isinstance(owner, Placement) else 0
    for replica, (_, other) in enumerate(flat, first_id):
        if other != structure:
            raise ValueError(
                f"the replicas returned different structures: replica {first_id} returned "
                f"{pytree.describe_structure(structure)}, replica {replica} returned "
                f"{pytree.describe_structure(other)}; return the same structure on every replica"
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
    return pytree.unflatten(structure, [joined(column) for column in columns])


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, DistributedValues) and not isinstance(leaf, PerReplica | Mirrored)
