"""Synchronization modes of variables: the functions that read and write the copies, as a table.

A write computes the new content first and then commits it in one call, so that an error or an
interrupt leaves all copies as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels import context, reduce_op
from dvkernels.enumeration import NamedEnum
from dvkernels.errors import ContextError, SynchronizationError
from dvkernels.profiler import debugging
from dvkernels.reduce_op import ReduceOp
from dvkernels.replica_context import ReplicaContext
from dvkernels.replicas.collective_call import CollectiveCall, Same
from dvkernels.values.distributed import DistributedValues, PerReplica
from dvkernels.variables import scatter
from dvkernels.variables.copies import Copies

__all__ = ["VariableAggregation", "VariableSynchronization"]


class VariableSynchronization(NamedEnum):
    """Mode that says when the copies of a variable are synchronized.

    Attributes
    ----------
    AUTO
        Resolves to ON_WRITE.
    NONE
        Never, unless the program calls ``sync``.
    ON_WRITE
        At every write in replica context: the copies are always equal.
    ON_READ
        At every read in cross-replica context, which returns the aggregate of the copies.
    """

    AUTO = "auto"
    NONE = "none"
    ON_WRITE = "on_write"
    ON_READ = "on_read"


class VariableAggregation(NamedEnum):
    """Reduction of the replicas' values to one value.

    Attributes
    ----------
    NONE
        There is none; operations that need one raise.
    SUM, MEAN
        The sum or the mean over all replicas.
    ONLY_FIRST_REPLICA
        The value of replica 0.
    """

    NONE = "none"
    SUM = "sum"
    MEAN = "mean"
    ONLY_FIRST_REPLICA = "only_first_replica"


# The writes: (copy, value, out) -> new content; a computed content goes to out.
WRITES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "assign": lambda _, value, __: value,
    "assign_add": np.add,
    "assign_sub": np.subtract,
}


def _write_alike(copies: Copies, verb: str, value: Any) -> None:
    """Write equal copies: compute the new content once, then commit it to all of them."""
    new = value
    if verb != "assign":
        new = copies.memory.apply(WRITES[verb], copies.arrays[0], value, copies.scratch())
    copies.commit([new] * len(copies.arrays))


_REDUCTIONS = {VariableAggregation.SUM: ReduceOp.SUM, VariableAggregation.MEAN: ReduceOp.MEAN}


class SyncMode(NamedTuple):
    """Functions that read and write a variable, in replica and in cross-replica context.

    In replica context writes take ``(copies, aggregation, verb, value, replica)``, scatters
    ``(copies, aggregation, verb, indices, updates, replica)`` and reads ``(copies, aggregation,
    replica)``; in cross-replica context ("across") the same without the replica.
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
    """Aggregate the values of all replicas, and write the result to every copy."""
    _check_aggregation(copies, aggregation, verb)
    checked = _checked_own(copies, verb, value, replica)

    def act(values: list[Any]) -> list[None]:
        combined = aggregated(copies, aggregation, values)
        _write_alike(copies, verb, combined)
        return [None] * len(values)

    _rendezvous(copies, verb, checked, act, replica)


def aggregate_then_scatter(
    copies: Copies,
    aggregation: VariableAggregation,
    verb: str,
    indices: Any,
    updates: Any,
    replica: ReplicaContext,
) -> None:
    """Apply the row updates of all replicas, in replica order, to every copy.

    SUM applies all updates, MEAN all of them divided by the number of replicas, and
    ONLY_FIRST_REPLICA those of replica 0.
    """
    _check_aggregation(copies, aggregation, verb)
    _check_additive(copies, aggregation, verb)
    own = _checked_updates(copies, verb, indices, updates, replica)

    def act(parts: list[scatter.Updates]) -> list[None]:
        placement = copies.placement
        if aggregation in _REDUCTIONS:
            applied = parts
        else:  # those of replica 0, a replica of the first worker
            applied = parts[: 1 if placement.workers.rank == 0 else 0]
        divisor = placement.num_replicas if aggregation is VariableAggregation.MEAN else 1
        own = scatter.concatenated(copies, applied, parts[0])
        gathered = scatter.gathered_from_workers(own, placement.workers)
        _scatter_alike(copies, verb, scatter.divided(gathered, divisor))
        return [None] * len(parts)

    _rendezvous(copies, verb, own, act, replica)


def scatter_own_copy(
    copies: Copies,
    aggregation: VariableAggregation,
    verb: str,
    indices: Any,
    updates: Any,
    replica: ReplicaContext,
) -> None:
    """Apply row updates to this replica's copy only."""
    own = copies.arrays[copies.index_of(replica.rank_in_process)]
    given = _checked_updates(copies, verb, indices, updates, replica)
    rows, content = scatter.new_rows(copies, own, verb, given)
    copies.memory.overwrite_rows([own], [rows], [content])


def refuse_to_scatter(
    copies: Copies, aggregation: VariableAggregation, verb: str, *_: object
) -> None:
    """Raise: row updates are not defined for a variable whose value is an aggregate of copies."""
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
    """Write this replica's copy only."""
    rank = replica.rank_in_process
    own = copies.arrays[copies.index_of(rank)]
    checked = _checked_own(copies, verb, value, replica)
    new = copies.memory.apply(WRITES[verb], own, checked, None)
    copies.commit_own(rank, new)


# -- writes in cross-replica context -------------------------------------------------------------


def write_every_copy_alike(
    copies: Copies, aggregation: VariableAggregation, verb: str, value: Any
) -> None:
    """Write the same value to every copy; a ``PerReplica`` raises."""
    if isinstance(value, PerReplica):
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: a PerReplica holds different values, and the "
            f"copies of an ON_WRITE variable are equal; reduce it first: "
            f"v.{verb}(strategy.reduce('mean', value))"
        )
    checked = copies.checked(_single_value(value, verb, copies), verb, None)
    _write_alike(copies, verb, copies.placement.broadcast_from_chief(checked))


def write_every_copy(
    copies: Copies, aggregation: VariableAggregation, verb: str, value: Any
) -> None:
    """Write the value, or its component of a ``PerReplica``, to every copy."""
    values = _checked_per_copy(copies, verb, value)
    write = functools.partial(copies.memory.apply, WRITES[verb])
    copies.commit([write(own, new, None) for own, new in zip(copies.arrays, values, strict=True)])


def scatter_every_copy_alike(
    copies: Copies, aggregation: VariableAggregation, verb: str, indices: Any, updates: Any
) -> None:
    """Apply the same row updates to every copy; a ``PerReplica`` raises."""
    _check_additive(copies, aggregation, verb)
    if isinstance(indices, PerReplica) or isinstance(updates, PerReplica):
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: a PerReplica holds different values, and the "
            f"copies of an ON_WRITE variable are equal; scatter in a replica, or pass one array"
        )
    _scatter_alike(copies, verb, _same_updates(copies, verb, indices, updates))


def _same_updates(copies: Copies, verb: str, indices: Any, updates: Any) -> scatter.Updates:
    """Return the checked updates for all copies of all workers: those of the first worker."""
    rows, content = _single_value(indices, verb, copies), _single_value(updates, verb, copies)
    checked = scatter.checked(copies, verb, rows, content, None)
    return scatter.Updates(*map(copies.placement.broadcast_from_chief, checked))


def scatter_every_copy(
    copies: Copies, aggregation: VariableAggregation, verb: str, indices: Any, updates: Any
) -> None:
    """Apply the row updates, or their components of a ``PerReplica``, to every copy."""
    if isinstance(indices, PerReplica) or isinstance(updates, PerReplica):
        rows, content = (_value_per_copy(copies, verb, value) for value in (indices, updates))
        first = copies.placement.first_replica
        checked = [
            scatter.checked(copies, verb, *pair, replica)
            for replica, pair in enumerate(zip(rows, content, strict=True), first)
        ]
    else:
        checked = [_same_updates(copies, verb, indices, updates)] * len(copies.arrays)
    pairs = zip(copies.arrays, checked, strict=True)
    changes = [scatter.new_rows(copies, own, verb, updates) for own, updates in pairs]
    copies.commit_rows([rows for rows, _ in changes], [content for _, content in changes])


def _scatter_alike(copies: Copies, verb: str, given: scatter.Updates) -> None:
    rows, content = scatter.new_rows(copies, copies.arrays[0], verb, given)
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


def write_shares(copies: Copies, aggregation: VariableAggregation, verb: str, value: Any) -> None:
    """Under SUM split the value into shares, one per copy; else write it to every copy."""
    if aggregation is not VariableAggregation.SUM or isinstance(value, PerReplica):
        if aggregation is VariableAggregation.SUM and verb != "assign":
            _refuse_add_to_sum(copies, verb)
        write_every_copy(copies, aggregation, verb, value)
        return
    if verb != "assign":
        _refuse_add_to_sum(copies, verb)
    placement = copies.placement
    total = placement.broadcast_from_chief(
        copies.checked(_single_value(value, verb, copies), verb, None)
    )
    shares = copies.memory.apply(_split_total, total, placement.num_replicas)
    copies.commit(shares[placement.first_replica :][: len(copies.arrays)])


def _refuse_add_to_sum(copies: Copies, verb: str) -> None:
    raise SynchronizationError(
        f"{verb} of variable {copies.name!r}: it is ON_READ with aggregation SUM, so in "
        f"cross-replica context it is not clear which copy should change; use "
        f"v.assign(v.read_value() + x), or write it in a replica"
    )


def _split_total(total: Any, num_copies: int) -> list[Any]:
    """Split a total into shares that add up to it; the first ones take an integer's remainder."""
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
    """Return the first copy: all are equal."""
    return copies.views[0]


def aggregate_copies(copies: Copies, aggregation: VariableAggregation) -> Any:
    """Return the aggregate of the copies of all workers, read-only."""
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
    """Return all copies of this process as a ``PerReplica``."""
    placement = copies.placement
    return PerReplica(copies.views, devices=placement.copy_devices, owner=placement)


def aggregated(copies: Copies, aggregation: VariableAggregation, values: list[Any]) -> Any:
    """Return the aggregate of one value per local replica, over all workers.

    Every worker must call this. NONE is accepted with a single replica only.
    """
    if aggregation in _REDUCTIONS:
        op = _REDUCTIONS[aggregation]
        reduce_op.check_dtype(f"variable {copies.name!r}", op, values[0].dtype)
        return copies.placement.communicator.reduce(values, op)
    return copies.placement.broadcast_from_chief(values[0])


def _checked_own(copies: Copies, verb: str, value: Any, replica: ReplicaContext) -> Any:
    """Return this replica's component of a value as a checked array."""
    return copies.checked(replica.own(value), verb, replica.replica_id_in_sync_group)


def _checked_updates(
    copies: Copies, verb: str, indices: Any, updates: Any, replica: ReplicaContext
) -> scatter.Updates:
    """Return this replica's components of indices and updates, checked."""
    rows, content = replica.own(indices), replica.own(updates)
    return scatter.checked(copies, verb, rows, content, replica.replica_id_in_sync_group)


def _rendezvous(
    copies: Copies,
    verb: str,
    payload: Any,
    act: Callable[[list[Any]], list[None]],
    replica: ReplicaContext,
) -> None:
    """Write this variable together with all replicas; the last one to arrive calls ``act``."""
    replica.meet(CollectiveCall(f"Variable.{verb}", (copies.name, Same(id(copies))), payload, act))


def _single_value(value: Any, verb: str, copies: Copies) -> Any:
    """Return a value for all copies: the first component of a ``Mirrored``, a variable's value."""
    if isinstance(value, PerReplica) or not isinstance(value, DistributedValues):
        return value
    return value.at(0) if not hasattr(value, "read_value") else value.read_value()


def _checked_per_copy(copies: Copies, verb: str, value: Any) -> list[Any]:
    """Return one checked array per copy: a ``PerReplica``'s components, or one array for all."""
    if isinstance(value, PerReplica):
        parts = _value_per_copy(copies, verb, value)
        first = copies.placement.first_replica
        return [copies.checked(part, verb, replica) for replica, part in enumerate(parts, first)]
    array = copies.placement.broadcast_from_chief(
        copies.checked(_single_value(value, verb, copies), verb, None)
    )
    return [copies.memory.to_device_of(array, copy) for copy in copies.arrays]


def _value_per_copy(copies: Copies, verb: str, value: Any) -> Sequence[Any]:
    """Return one value per copy: the components of a ``PerReplica``, or one value for all."""
    if not isinstance(value, PerReplica):
        return [_single_value(value, verb, copies)] * len(copies.arrays)
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
        write_shares, refuse_to_scatter, aggregate_copies,
    ),
    VariableSynchronization.NONE: SyncMode(
        write_own_copy, scatter_own_copy, own_copy,
        write_every_copy, scatter_every_copy, every_copy,
    ),
}  # fmt: skip
