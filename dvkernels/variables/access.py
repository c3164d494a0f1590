"""Access to variables: the context that reads or writes one, and whether it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dvkernels import context
from dvkernels.errors import ContextError, SynchronizationError
from dvkernels.replica_context import ReplicaContext
from dvkernels.replicas.collective_call import CollectiveCall, Same
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.variables.copies import Copies
from dvkernels.variables.modes import VariableAggregation

__all__: list[str] = []

# The replica context of code outside every scope, for variables created outside every scope.
LONE_REPLICA = ReplicaContext(context.UNSCOPED, Rendezvous(1), 0, None)


def calling_replica(copies: Copies, verb: str, *, write: bool) -> ReplicaContext | None:
    """Return the calling replica, None in cross-replica context; raise if access is refused."""
    placement = copies.placement
    frame = context.find()
    if frame is None and placement.is_of(context.UNSCOPED):
        return LONE_REPLICA
    if frame is None or context.is_outside(frame) or placement.is_of(frame.placement):
        replica: ReplicaContext | None = None if frame is None else frame.replica
        if write and replica is None:
            context.check_no_step_elsewhere(
                placement.parent or placement, f"{verb} of variable {copies.name!r}"
            )
        return replica
    if not placement.is_of(context.UNSCOPED):
        raise ContextError(
            f"{verb} of variable {copies.name!r}: it belongs to {placement.name}, and this runs "
            f"under {frame.placement.name}; leave that strategy's scope first"
        )
    if frame.replica is not None and frame.replica.trace is not None:
        raise ContextError(
            f"{verb} of variable {copies.name!r} in a step compiled for {frame.placement.name}: it "
            f"was created outside every scope, so its value would become a constant of the "
            f"program; create it inside strategy.scope(), or pass its value as an argument"
        )
    if write and frame.replica is not None:
        raise ContextError(
            f"{verb} of variable {copies.name!r} in a replica of {frame.placement.name}: it was "
            f"created outside every scope, so all replicas would write the same copy; create "
            f"it inside strategy.scope()"
        )
    return LONE_REPLICA


def check_aggregation(copies: Copies, verb: str) -> None:
    """Raise where several replicas write a variable whose values have no aggregate."""
    count = copies.placement.num_replicas
    if copies.aggregation is VariableAggregation.NONE and count > 1:
        frame = context.find()
        if frame is not None and frame.replica is not None and frame.replica.item_index is not None:
            write_together(copies, verb, None, list, frame.replica)  # raises: there is no meeting
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r} in replica context needs an aggregation: it was "
            f"created with aggregation='none', which does not say how the values of {count} "
            f"replicas become one; create it with 'sum', 'mean' or 'only_first_replica', or write "
            f"it in merge_call"
        )


def write_together(
    copies: Copies,
    verb: str,
    payload: Any,
    act: Callable[[list[Any]], list[None]],
    replica: ReplicaContext,
) -> None:
    """Write a variable together with all replicas; the last one to arrive calls ``act``."""
    if replica is LONE_REPLICA:  # it has nobody to meet, also in a forked process
        act([payload])
        return
    replica.meet(CollectiveCall(f"Variable.{verb}", (copies.name, Same(id(copies))), payload, act))
