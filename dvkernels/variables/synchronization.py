"""Synchronization modes of variables: the functions that read and write the copies, as a table.

A write computes the new content first and then commits it in one call, so that an error or an
interrupt leaves all copies as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dvkernels import reduce_op
from dvkernels.devices.array_spec import Array
from dvkernels.errors import SynchronizationError
from dvkernels.profiler import debugging, tracing
from dvkernels.reduce_op import ReduceOp
from dvkernels.replica_context import ReplicaContext
from dvkernels.values.distributed import PerReplica
from dvkernels.variables import scatter
from dvkernels.variables.access import check_aggregation, write_together
from dvkernels.variables.copies import Copies
from dvkernels.variables.modes import (
    VariableAggregation,
    VariableSynchronization,
    traceable,
)
from dvkernels.variables.table_server import SERVED

__all__: list[str] = []

_REDUCTIONS = {VariableAggregation.SUM: ReduceOp.SUM, VariableAggregation.MEAN: ReduceOp.MEAN}

# The writes: (copy, value, out) -> new content; a computed content goes to out.
_WRITES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "assign": lambda _, value, __: value,
    "assign_add": np.add,
    "assign_sub": np.subtract,
}


class SyncMode(NamedTuple):
    """Functions that read and write a variable, in replica and in cross-replica context.

    In replica context writes take ``(copies, verb, value, replica)``, scatters ``(copies, verb,
    indices, updates, replica)`` and reads ``(copies, replica)``; in cross-replica context
    ("across") the same without the replica.
    """

    write_in_replica: Callable[..., None]
    scatter_in_replica: Callable[..., None]
    read_in_replica: Callable[..., Any]
    write_across: Callable[..., None]
    scatter_across: Callable[..., None]
    read_across: Callable[..., Any]


# -- writes in replica context -------------------------------------------------------------------


def aggregate_then_write(copies: Copies, verb: str, value: Any, replica: ReplicaContext) -> None:
    """Aggregate the values of all replicas, and write the result to every copy."""
    check_aggregation(copies, verb)
    checked = copies.checked(replica.own(value), verb, replica.replica_id_in_sync_group)

    def act(values: list[Any]) -> list[None]:
        write_alike(copies, verb, aggregated(copies, values))
        return [None] * len(values)

    write_together(copies, verb, checked, act, replica)


def write_own_copy(copies: Copies, verb: str, value: Any, replica: ReplicaContext) -> None:
    """Write this replica's copy only."""
    rank = replica.rank_in_process
    checked = copies.checked(replica.own(value), verb, replica.replica_id_in_sync_group)
    own = copies.arrays[copies.index_of(rank)]
    copies.commit_own(rank, copies.memory.apply(_WRITES[verb], own, checked, None))


# -- writes in cross-replica context -------------------------------------------------------------


def write_every_copy_alike(copies: Copies, verb: str, value: Any) -> None:
    """Write the same value to every copy; a ``PerReplica`` raises."""
    if isinstance(value, PerReplica):
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: a PerReplica holds different values, and the "
            f"copies of an ON_WRITE variable are equal; reduce it first: "
            f"v.{verb}(strategy.reduce('mean', value))"
        )
    write_alike(copies, verb, copies.checked_for_all(value, verb))


def write_every_copy(copies: Copies, verb: str, value: Any) -> None:
    """Write the value, or its component of a ``PerReplica``, to every copy."""
    if isinstance(value, PerReplica):
        parts = enumerate(copies.components(value, verb), copies.placement.first_replica)
        values = [copies.checked(part, verb, replica) for replica, part in parts]
    else:
        array = copies.checked_for_all(value, verb)
        values = [copies.memory.to_device_of(array, copy) for copy in copies.arrays]
    write = functools.partial(copies.memory.apply, _WRITES[verb])
    copies.commit([write(own, new, None) for own, new in zip(copies.arrays, values, strict=True)])


def write_shares(copies: Copies, verb: str, value: Any) -> None:
    """Under SUM split the value into shares, one per copy; else write it to every copy."""
    is_sum = copies.aggregation is VariableAggregation.SUM
    if is_sum and verb != "assign":
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: it is ON_READ with aggregation SUM, so in "
            f"cross-replica context it is not clear which copy should change; use "
            f"v.assign(v.read_value() + x), or write it in a replica"
        )
    if not is_sum or isinstance(value, PerReplica):
        write_every_copy(copies, verb, value)
        return
    total, placement = copies.checked_for_all(value, verb), copies.placement
    shares = copies.memory.apply(_split_total, total, placement.num_replicas)
    copies.commit(shares[placement.first_replica :][: len(copies.arrays)])


def write_at_server(
    copies: Copies, verb: str, value: Any, replica: ReplicaContext | None = None
) -> None:
    """Let the server write a value; the writes of other calls come before or after it."""
    own = value if replica is None else replica.own(value)
    if isinstance(own, PerReplica):
        write_every_copy_alike(copies, verb, own)  # raises
    checked = copies.checked_for_all(own, verb)
    assert copies.server is not None
    copies.server.apply(verb, write_alike, copies, verb, checked)


def write_alike(copies: Copies, verb: str, value: Array) -> None:
    """Write equal copies: compute the new content once, then commit it to all of them."""
    new = value
    if verb != "assign":
        new = copies.memory.apply(_WRITES[verb], copies.arrays[0], value, copies.scratch())
    copies.commit([new] * len(copies.arrays))


def _split_total(total: Any, num_copies: int) -> list[Any]:
    """Split a total into shares that add up to it; the first ones take an integer's remainder."""
    if total.dtype.kind in "iu":
        base, rest = np.divmod(total, total.dtype.type(num_copies))
        return [base + (rank < rest).astype(total.dtype) for rank in range(num_copies)]
    if total.dtype.kind == "b":
        return [total, *(np.zeros_like(total) for _ in range(num_copies - 1))]
    return [total / total.dtype.type(num_copies)] * num_copies


# -- reads ---------------------------------------------------------------------------------------


def own_copy(copies: Copies, replica: ReplicaContext) -> Array:
    """Return the copy of this replica."""
    return copies.views[copies.index_of(replica.rank_in_process)]


def first_copy(copies: Copies) -> Array:
    """Return the first copy: all are equal."""
    return copies.views[0]


def read_at_server(copies: Copies, _: ReplicaContext | None = None) -> Array:
    """Return a read-only copy of the value between two writes."""
    assert copies.server is not None
    return copies.server.ask("read_value", taken, copies)


def taken(copies: Copies) -> Array:
    taken: Array = copies.memory.read_only(copies.memory.apply(np.array, copies.arrays[0]))
    return taken


def every_copy(copies: Copies) -> PerReplica[Array]:
    """Return all copies of this process as a ``PerReplica``."""
    placement = copies.placement
    return PerReplica(copies.views, devices=placement.copy_devices, owner=placement)


def aggregate_copies(copies: Copies) -> Array:
    """Return the aggregate of the copies of all workers, read-only."""
    if copies.aggregation is VariableAggregation.NONE:
        raise SynchronizationError(
            f"variable {copies.name!r} is ON_READ with aggregation NONE, so a read in "
            f"cross-replica context is not defined; read v.values, or create it with 'sum', "
            f"'mean' or 'only_first_replica'"
        )
    if debugging.active is not None:
        debugging.active.note_aggregate(id(copies), copies.name)
    recording = tracing.active
    began = 0 if recording is None else recording.begin("read")
    result: Array = copies.memory.read_only(aggregated(copies, list(copies.arrays)))
    if recording is not None:
        about = {"variables": [copies.name], "bytes": result.nbytes, "dtype": str(result.dtype)}
        recording.end("read", "read", began, about)
    return result


def aggregated(copies: Copies, values: list[Array]) -> Any:
    """Return the aggregate of one value per local replica, over all workers.

    Every worker must call this. NONE is accepted with a single replica only.
    """
    op = _REDUCTIONS.get(copies.aggregation)
    if op is None:
        return copies.placement.broadcast_from_chief(values[0])
    reduce_op.check_dtype(f"variable {copies.name!r}", op, values[0].dtype)
    return copies.placement.communicator.reduce(values, op)


SYNC_MODES: dict[Any, SyncMode] = {
    #                 in replica context: write, scatter, read
    #                 in cross-replica context: write, scatter, read
    VariableSynchronization.ON_WRITE: SyncMode(
        aggregate_then_write, scatter.aggregate_then_scatter, own_copy,
        write_every_copy_alike, scatter.scatter_every_copy_alike, first_copy,
    ),
    VariableSynchronization.ON_READ: SyncMode(
        write_own_copy, scatter.refuse_to_scatter, own_copy,
        write_shares, scatter.refuse_to_scatter, aggregate_copies,
    ),
    VariableSynchronization.NONE: SyncMode(
        write_own_copy, scatter.scatter_own_copy, own_copy,
        write_every_copy, scatter.scatter_every_copy, every_copy,
    ),
    SERVED: SyncMode(
        write_at_server, scatter.scatter_at_server, read_at_server,
        write_at_server, scatter.scatter_at_server, read_at_server,
    ),
}  # fmt: skip


def _traceable(mode: SyncMode) -> SyncMode:
    """Return a mode whose replicas may be traced by JAX: the trace then has the values."""

    def write(copies: Copies, verb: str, value: Any, replica: ReplicaContext) -> None:
        if replica.trace is None:
            mode.write_in_replica(copies, verb, value, replica)
        else:
            replica.trace.write(copies, verb, replica.own(value))

    def scatter_rows(
        copies: Copies, verb: str, indices: Any, updates: Any, replica: ReplicaContext
    ) -> None:
        if replica.trace is None:
            mode.scatter_in_replica(copies, verb, indices, updates, replica)
        else:
            replica.trace.scatter(copies, verb, replica.own(indices), replica.own(updates))

    def read(copies: Copies, replica: ReplicaContext) -> Any:
        if replica.trace is None:
            return mode.read_in_replica(copies, replica)
        return replica.trace.read(copies)

    return SyncMode(write, scatter_rows, read, *mode[3:])


SYNC_MODES |= {
    traceable(when): _traceable(mode) for when, mode in SYNC_MODES.items() if when != SERVED
}
