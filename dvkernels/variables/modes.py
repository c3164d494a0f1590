"""When the copies of a variable are brought together: one row per synchronization mode.

A write is worked out first and committed in one go, so that an error or an interrupt leaves all
copies as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels import context, reduce_op
from dvkernels.context import ReplicaContext
from dvkernels.enumeration import NamedEnum
from dvkernels.errors import ContextError, SynchronizationError
from dvkernels.profiler import debugging
from dvkernels.reduce_op import ReduceOp
from dvkernels.replicas.rendezvous import CollectiveCall, Same
from dvkernels.values.distributed import DistributedValues, PerReplica
from dvkernels.variables import scatter
from dvkernels.variables.copies import Copies

__all__ = ["VariableAggregation", "VariableSynchronization"]


class VariableSynchronization(NamedEnum):
    """When the copies of a variable are brought together."""

    AUTO = "auto"  # resolves to ON_WRITE
    NONE = "none"  # never, unless the user calls sync
    ON_WRITE = "on_write"  # at every write in replica context: the copies are always equal
    ON_READ = "on_read"  # at every read in cross-replica context


class VariableAggregation(NamedEnum):
    """How the replicas' values become one."""

    NONE = "none"
    SUM = "sum"
    MEAN = "mean"
    ONLY_FIRST_REPLICA = "only_first_replica"


# What a write does to a copy: (copy, value, out) -> new content, in out if it is worked out.
WRITES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "assign": lambda _, value, __: value,
    "assign_add": np.add,
    "assign_sub": np.subtract,
}


def _write_alike(copies: Copies, verb: str, value: Any) -> None:
    """Write equal copies: work out the new content once, then commit it to all."""
    new = value
    if verb != "assign":
        new = copies.memory.apply(WRITES[verb], copies.arrays[0], value, copies.scratch())
    copies.commit([new] * len(copies.arrays))


_REDUCTIONS = {VariableAggregation.SUM: ReduceOp.SUM, VariableAggregation.MEAN: ReduceOp.MEAN}


class SyncMode(NamedTuple):
    """What reads and writes mean, in a replica and across replicas.

    In a replica writes take ``(copies, aggregation, verb, value, replica)``, scatters
    ``(copies, aggregation, verb, indices, updates, replica)`` and reads ``(copies, aggregation,
    replica)``; across replicas the same without the replica.
    """

    write_in_replica: Callable[..., None]
    scatter_in_replica: Callable[..., None]
    read_in_replica: Callable[..., Any]
    write_across: Callable[..., None]
    scatter_across: Callable[..., None]
    read_across: Callable[..., Any]


# -- writes in replica context -------------------------------------------------------------------


def aggregate_then_write(
    copies: Copies,
    aggregation: VariableAggregation,
    verb: str,
    value: Any,
    replica: ReplicaContext,
) -> None:
    """All replicas bring a value; every copy gets what the aggregation makes of them."""
    _check_aggregation(copies, aggregation, verb)
    checked = _checked_own(copies, verb, value, replica)

    def act(values: list[Any]) -> list[None]:
        combined = aggregated(copies, aggregation, values)
        _write_alike(copies, verb, combined)
        return [None] * len(values)

    _meet(copies, verb, checked, act, replica)


def aggregate_then_scatter(
    copies: Copies,
    aggregation: VariableAggregation,
    verb: str,
    indices: Any,
    updates: Any,
    replica: ReplicaContext,
) -> None:
    """All replicas bring updates of some rows; every copy gets those that the aggregation takes.

    SUM takes all, MEAN all of them divided by the number of replicas, in replica order.
    """
    _check_aggregation(copies, aggregation, verb)
    _check_additive(copies, aggregation, verb)
    own = _checked_updates(copies, verb, indices, updates, replica)

    def act(parts: list[scatter.Updates]) -> list[None]:
        placement = copies.placement
        if aggregation in _REDUCTIONS:
            taken = parts
        else:  # those of replica 0, which the first worker has
            taken = parts[: 1 if placement.workers.rank == 0 else 0]
        divisor = placement.num_replicas if aggregation is VariableAggregation.MEAN else 1
        own = scatter.joined(copies, taken, parts[0])
        of_all = scatter.of_all_workers(own, placement.workers)
        _scatter_alike(copies, verb, scatter.divided(of_all, divisor))
        return [None] * len(parts)

    _meet(copies, verb, own, act, replica)


def scatter_own_copy(
    copies: Copies,
    aggregation: VariableAggregation,
    verb: str,
    indices: Any,
    updates: Any,
    replica: ReplicaContext,
) -> None:
    """Only rows of this replica's copy change."""
    own = copies.arrays[copies.index_of(replica.rank_in_process)]
    given = _checked_updates(copies, verb, indices, updates, replica)
    rows, content = scatter.changed(copies, own, verb, given)
    copies.memory.overwrite_rows([own], [rows], [content])


def refuse_to_scatter(
    copies: Copies, aggregation: VariableAggregation, verb: str, *_: object
) -> None:
    """Raise: what a sum over copies would mean for a row is not defined."""
    raise SynchronizationError(
        f"{verb} of variable {copies.name!r}: it is ON_READ, which takes assign, assign_add and "
        f"assign_sub only; use synchronization='none' or 'on_write'"
    )


def write_own_copy(
    copies: Copies,
    aggregation: VariableAggregation,
    verb: str,
    value: Any,
    replica: ReplicaContext,
) -> None:
    """Only this replica's copy changes."""
    rank = replica.rank_in_process
    own = copies.arrays[copies.index_of(rank)]
    brought = _checked_own(copies, verb, value, replica)
    new = copies.memory.apply(WRITES[verb], own, brought, None)
    copies.commit_own(rank, new)


# -- writes in cross-replica context -------------------------------------------------------------


def write_every_copy_alike(
    copies: Copies, aggregation: VariableAggregation, verb: str, value: Any
) -> None:
    """Every copy gets the same value; a ``PerReplica`` would let them drift apart."""
    if isinstance(value, PerReplica):
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: a PerReplica holds different values, and the "
            f"copies of an ON_WRITE variable are equal; reduce it first: "
            f"v.{verb}(strategy.reduce('mean', value))"
        )
    checked = copies.checked(_one(value, verb, copies), verb, None)
    _write_alike(copies, verb, copies.placement.of_chief(checked))


def write_every_copy(
    copies: Copies, aggregation: VariableAggregation, verb: str, value: Any
) -> None:
    """Every copy gets the value, or its component of a ``PerReplica``."""
    values = _for_each_copy(copies, verb, value)
    write = functools.partial(copies.memory.apply, WRITES[verb])
    copies.commit([write(own, new, None) for own, new in zip(copies.arrays, values, strict=True)])


def scatter_every_copy_alike(
    copies: Copies, aggregation: VariableAggregation, verb: str, indices: Any, updates: Any
) -> None:
    """Rows of every copy get the same updates."""
    _check_additive(copies, aggregation, verb)
    if isinstance(indices, PerReplica) or isinstance(updates, PerReplica):
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: a PerReplica holds different values, and the "
            f"copies of an ON_WRITE variable are equal; scatter in a replica, or pass one array"
        )
    _scatter_alike(copies, verb, _updates_for_all(copies, verb, indices, updates))


def _updates_for_all(copies: Copies, verb: str, indices: Any, updates: Any) -> scatter.Updates:
    """Return updates that are the same for every copy: those of the first worker."""
    where, what = _one(indices, verb, copies), _one(updates, verb, copies)
    given = scatter.checked(copies, verb, where, what, None)
    return scatter.Updates(*map(copies.placement.of_chief, given))


def scatter_every_copy(
    copies: Copies, aggregation: VariableAggregation, verb: str, indices: Any, updates: Any
) -> None:
    """Rows of every copy get the updates, or their components of a ``PerReplica``."""
    if isinstance(indices, PerReplica) or isinstance(updates, PerReplica):
        where, what = (_each(copies, verb, value) for value in (indices, updates))
        first = copies.placement.first_replica
        given = [
            scatter.checked(copies, verb, *pair, replica)
            for replica, pair in enumerate(zip(where, what, strict=True), first)
        ]
    else:
        given = [_updates_for_all(copies, verb, indices, updates)] * len(copies.arrays)
    pairs = zip(copies.arrays, given, strict=True)
    found = [scatter.changed(copies, own, verb, one) for own, one in pairs]
    copies.commit_rows([rows for rows, _ in found], [content for _, content in found])


def _scatter_alike(copies: Copies, verb: str, given: scatter.Updates) -> None:
    rows, content = scatter.changed(copies, copies.arrays[0], verb, given)
    copies.commit_rows([rows] * len(copies.arrays), [content] * len(copies.arrays))


def _check_additive(copies: Copies, aggregation: VariableAggregation, verb: str) -> None:
    is_scoped = copies.placement is not context.UNSCOPED
    if verb in scatter.NOT_ADDITIVE and aggregation in _REDUCTIONS and is_scoped:
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: aggregation {aggregation.name} does not say what "
            f"the updates of several replicas make of a row; use 'only_first_replica', or "
            f"scatter_add, scatter_sub, scatter_mul or scatter_div"
        )


def _check_aggregation(copies: Copies, aggregation: VariableAggregation, verb: str) -> None:
    if aggregation is VariableAggregation.NONE and _has_several(copies):
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r} in replica context needs an aggregation: it was "
            f"created with aggregation='none', which does not say how the values of "
            f"{copies.placement.num_replicas} replicas become one; create it with 'sum', 'mean' or "
            f"'only_first_replica', or write it in merge_call"
        )


def _has_several(copies: Copies) -> bool:
    return copies.placement.num_replicas > 1


def share_out(copies: Copies, aggregation: VariableAggregation, verb: str, value: Any) -> None:
    """Under SUM the copies together get the value; else every copy gets it."""
    if aggregation is not VariableAggregation.SUM or isinstance(value, PerReplica):
        if aggregation is VariableAggregation.SUM and verb != "assign":
            _refuse_adding_to_a_sum(copies, verb)
        write_every_copy(copies, aggregation, verb, value)
        return
    if verb != "assign":
        _refuse_adding_to_a_sum(copies, verb)
    placement = copies.placement
    total = placement.of_chief(copies.checked(_one(value, verb, copies), verb, None))
    shares = copies.memory.apply(_shares, total, placement.num_replicas)
    copies.commit(shares[placement.first_replica :][: len(copies.arrays)])


def _refuse_adding_to_a_sum(copies: Copies, verb: str) -> None:
    raise SynchronizationError(
        f"{verb} of variable {copies.name!r}: it is ON_READ with aggregation SUM, so in "
        f"cross-replica context it is not clear which copy should change; use "
        f"v.assign(v.read_value() + x), or write it in a replica"
    )


def _shares(total: Any, num_copies: int) -> list[Any]:
    """Split a total so that the shares add up to it: integers keep their remainder."""
    if total.dtype.kind in "iu":
        base, rest = np.divmod(total, total.dtype.type(num_copies))
        return [base + (rank < rest).astype(total.dtype) for rank in range(num_copies)]
    if total.dtype.kind == "b":
        return [total, *(np.zeros_like(total) for _ in range(num_copies - 1))]
    share = total / total.dtype.type(num_copies)
    return [share] * num_copies


# -- reads ---------------------------------------------------------------------------------------


def own_copy(copies: Copies, aggregation: VariableAggregation, replica: ReplicaContext) -> Any:
    """Return the copy of this replica."""
    return copies.views[copies.index_of(replica.rank_in_process)]


def first_copy(copies: Copies, aggregation: VariableAggregation) -> Any:
    """Return any copy: all are equal."""
    return copies.views[0]


def aggregate_copies(copies: Copies, aggregation: VariableAggregation) -> Any:
    """Return what the aggregation makes of the copies."""
    if aggregation is VariableAggregation.NONE:
        raise SynchronizationError(
            f"variable {copies.name!r} is ON_READ with aggregation NONE, so a read in "
            f"cross-replica context is not defined; read v.values, or create it with 'sum', "
            f"'mean' or 'only_first_replica'"
        )
    if debugging.active is not None:
        debugging.active.note_aggregate(id(copies), copies.name)
    result = aggregated(copies, aggregation, list(copies.arrays))
    return copies.memory.read_only(result)


def every_copy(copies: Copies, aggregation: VariableAggregation) -> Any:
    """Return all copies, as they are."""
    placement = copies.placement
    return PerReplica(copies.views, devices=placement.copy_devices, owner=placement)


def aggregated(copies: Copies, aggregation: VariableAggregation, values: list[Any]) -> Any:
    """Return what the aggregation makes of one value per local replica, on all workers alike.

    NONE only with one replica.
    """
    if aggregation in _REDUCTIONS:
        op = _REDUCTIONS[aggregation]
        reduce_op.check_dtype(f"variable {copies.name!r}", op, values[0].dtype)
        return copies.placement.communicator.reduce(values, op)
    return copies.placement.of_chief(values[0])


def _checked_own(copies: Copies, verb: str, value: Any, replica: ReplicaContext) -> Any:
    """Return what a value means to this replica, as an array that fits."""
    return copies.checked(replica.own(value), verb, replica.replica_id_in_sync_group)


def _checked_updates(
    copies: Copies, verb: str, indices: Any, updates: Any, replica: ReplicaContext
) -> scatter.Updates:
    """Return what updates mean to this replica, one by one."""
    where, what = replica.own(indices), replica.own(updates)
    return scatter.checked(copies, verb, where, what, replica.replica_id_in_sync_group)


def _meet(
    copies: Copies,
    verb: str,
    payload: Any,
    act: Callable[[list[Any]], list[None]],
    replica: ReplicaContext,
) -> None:
    """Meet the other replicas at a write of this variable."""
    replica.meet(CollectiveCall(f"Variable.{verb}", (copies.name, Same(id(copies))), payload, act))


def _one(value: Any, verb: str, copies: Copies) -> Any:
    """Return the one array that a value means in cross-replica context."""
    if isinstance(value, PerReplica) or not isinstance(value, DistributedValues):
        return value
    return value.at(0) if not hasattr(value, "read_value") else value.read_value()


def _for_each_copy(copies: Copies, verb: str, value: Any) -> list[Any]:
    if isinstance(value, PerReplica):
        parts = _each(copies, verb, value)
        first = copies.placement.first_replica
        return [copies.checked(part, verb, replica) for replica, part in enumerate(parts, first)]
    one = copies.placement.of_chief(copies.checked(_one(value, verb, copies), verb, None))
    return [copies.memory.near(one, copy) for copy in copies.arrays]


def _each(copies: Copies, verb: str, value: Any) -> Sequence[Any]:
    """Return what a value means to each copy in cross-replica context."""
    if not isinstance(value, PerReplica):
        return [_one(value, verb, copies)] * len(copies.arrays)
    foreign = value.owner is not None and value.owner is not copies.placement
    if foreign or len(value) != len(copies.arrays):
        raise ContextError(
            f"{verb} of variable {copies.name!r} expected a PerReplica of its own strategy's "
            f"{len(copies.arrays)} replicas, got one of {len(value)} replicas"
        )
    return value.values


SYNC_MODES = {
    #                 in replica context: write, scatter, read
    #                 in cross-replica context: write, scatter, read
    VariableSynchronization.ON_WRITE: SyncMode(
        aggregate_then_write, aggregate_then_scatter, own_copy,
        write_every_copy_alike, scatter_every_copy_alike, first_copy,
    ),
    VariableSynchronization.ON_READ: SyncMode(
        write_own_copy, refuse_to_scatter, own_copy,
        share_out, refuse_to_scatter, aggregate_copies,
    ),
    VariableSynchronization.NONE: SyncMode(
        write_own_copy, scatter_own_copy, own_copy,
        write_every_copy, scatter_every_copy, every_copy,
    ),
}  # fmt: skip
