"""Scatter operations: writes of some rows of a variable, such as ``scatter_add``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dvkernels import context, reduce_op
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import HostArray, Spec, spec
from dvkernels.errors import BufferMismatchError, SynchronizationError
from dvkernels.kernels import backends
from dvkernels.profiler import debugging, tracing
from dvkernels.replica_context import ReplicaContext
from dvkernels.values.distributed import PerReplica
from dvkernels.variables.access import check_aggregation, write_together
from dvkernels.variables.copies import Copies, check_written, trace_write, value_for_all
from dvkernels.variables.modes import VariableAggregation
from dvkernels.variables.rows import checked_rows

__all__: list[str] = []


# The operation of an update on a row; several updates of one row are applied one after another.
_CHANGES: dict[str, np.ufunc] = {
    "scatter_add": np.add,
    "scatter_sub": np.subtract,
    "scatter_mul": np.multiply,
    "scatter_div": np.divide,
    "scatter_min": np.minimum,
    "scatter_max": np.maximum,
}
# For these the result of several replicas' updates depends on their order or on the extreme one, so
# neither SUM nor MEAN defines it.
_NOT_ADDITIVE = frozenset({"scatter_update", "scatter_min", "scatter_max"})


class Updates(NamedTuple):
    """Updates of rows: ``updates[k]`` applies to row ``indices[k]``."""

    indices: HostArray
    updates: Any


# -- the scatters of the modes -------------------------------------------------------------------


def aggregate_then_scatter(
    copies: Copies, verb: str, indices: Any, updates: Any, replica: ReplicaContext
) -> None:
    """Apply the row updates of all replicas, in replica order, to every copy.

    SUM applies all updates, MEAN all of them divided by the number of replicas, and
    ONLY_FIRST_REPLICA those of replica 0.
    """
    check_aggregation(copies, verb)
    check_additive(copies, verb)
    own = _checked_own(copies, verb, indices, updates, replica)

    def act(parts: list[Updates]) -> list[None]:
        placement, how = copies.placement, copies.aggregation
        workers, applied = placement.workers, parts
        if how not in (VariableAggregation.SUM, VariableAggregation.MEAN):
            # those of replica 0, a replica of the first worker
            applied = parts[: 1 if workers.rank == 0 else 0]
        if workers.size > 1:
            own = _concatenated(copies, applied or [_none_of(parts[0])])
            applied = [Updates(*(workers.all_gather([array], 0)[0] for array in own))]
        divisor = placement.num_replicas if how is VariableAggregation.MEAN else 1
        _apply(copies, verb, [_RowChange(range(len(copies.arrays)), applied)], divisor)
        return [None] * len(parts)

    write_together(copies, verb, own, act, replica)


def scatter_own_copy(
    copies: Copies, verb: str, indices: Any, updates: Any, replica: ReplicaContext
) -> None:
    """Apply row updates to this replica's copy only."""
    own = copies.index_of(replica.rank_in_process)
    given = _checked_own(copies, verb, indices, updates, replica)
    _apply(copies, verb, [_RowChange([own], [given])])


def scatter_every_copy_alike(copies: Copies, verb: str, indices: Any, updates: Any) -> None:
    """Apply the same row updates to every copy; a ``PerReplica`` raises."""
    check_additive(copies, verb)
    if isinstance(indices, PerReplica) or isinstance(updates, PerReplica):
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: a PerReplica holds different values, and the "
            f"copies of an ON_WRITE variable are equal; scatter in a replica, or pass one array"
        )
    given = _checked_for_all(copies, verb, indices, updates)
    _apply(copies, verb, [_RowChange(range(len(copies.arrays)), [given])])


def scatter_every_copy(copies: Copies, verb: str, indices: Any, updates: Any) -> None:
    """Apply the row updates, or their components of a ``PerReplica``, to every copy."""
    if isinstance(indices, PerReplica) or isinstance(updates, PerReplica):
        rows, content = copies.components(indices, verb), copies.components(updates, verb)
        first = copies.placement.first_replica
        checked = [
            _checked(copies, verb, *pair, replica)
            for replica, pair in enumerate(zip(rows, content, strict=True), first)
        ]
    else:
        checked = [_checked_for_all(copies, verb, indices, updates)] * len(copies.arrays)
    _apply(copies, verb, [_RowChange([own], [given]) for own, given in enumerate(checked)])


def scatter_at_server(
    copies: Copies, verb: str, indices: Any, updates: Any, replica: ReplicaContext | None = None
) -> None:
    """Let the server apply row updates; those of other calls come before or after them."""
    number = None
    if replica is not None:
        indices, updates = replica.own(indices), replica.own(updates)
        number = replica.replica_id_in_sync_group
    rows, content = value_for_all(indices), value_for_all(updates)
    given = _checked(copies, verb, rows, content, number)
    assert copies.server is not None
    copies.server.apply(verb, apply_updates, copies, verb, *given)


def apply_updates(copies: Copies, verb: str, indices: HostArray, updates: Any) -> None:
    _apply(copies, verb, [_RowChange(range(1), [Updates(indices, updates)])])


def refuse_to_scatter(copies: Copies, verb: str, *_: object) -> NoReturn:
    """Raise: row updates are not defined for a variable whose value is an aggregate of copies."""
    raise SynchronizationError(
        f"{verb} of variable {copies.name!r}: it is ON_READ, which takes assign, assign_add and "
        f"assign_sub only; use synchronization='none' or 'on_write'"
    )


# -- checks --------------------------------------------------------------------------------------


def check_additive(copies: Copies, verb: str) -> None:
    """Raise where neither SUM nor MEAN defines what updates of several replicas make of a row."""
    combines = copies.aggregation in (VariableAggregation.SUM, VariableAggregation.MEAN)
    if verb in _NOT_ADDITIVE and combines and copies.placement is not context.UNSCOPED:
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: aggregation {copies.aggregation.name} does not "
            f"say what the updates of several replicas make of a row; use 'only_first_replica', or "
            f"scatter_add, scatter_sub, scatter_mul or scatter_div"
        )


def _checked(copies: Copies, verb: str, indices: Any, updates: Any, replica: int | None) -> Updates:
    """Return the updates with flat indices; wrong indices, shapes or dtypes raise."""
    shape, dtype = copies.arrays[0].shape, copies.arrays[0].dtype
    what = f"{verb} of variable {copies.name!r}"
    rows = checked_rows(copies, verb, indices, replica)
    array = copies.converted(updates, verb, replica)
    expected = Spec((*rows.shape, *shape[1:]), dtype)
    is_number = isinstance(updates, (bool, int, float, complex)) and array.ndim == 0
    if is_number and array.dtype == dtype:
        array = np.broadcast_to(np.full(shape[1:], array), expected.shape)
    if spec(array) != expected:
        origin = "" if replica is None else f" from replica {replica}"
        raise BufferMismatchError(
            f"{what} at indices of shape {rows.shape} expected {expected}, or a number, got "
            f"{spec(array)}{origin}"
        )
    if debugging.active is not None:
        debugging.check_finite(what, [array])
    flat = array.reshape(-1, *shape[1:]) if rows.size else array.reshape(0, *shape[1:])
    near = copies.memory.to_device_of(flat, copies.read_by(replica))
    return Updates(rows.reshape(-1), near)


def _checked_own(
    copies: Copies, verb: str, indices: Any, updates: Any, replica: ReplicaContext
) -> Updates:
    """Return this replica's components of indices and updates, checked."""
    rows, content = replica.own(indices), replica.own(updates)
    return _checked(copies, verb, rows, content, replica.replica_id_in_sync_group)


def _checked_for_all(copies: Copies, verb: str, indices: Any, updates: Any) -> Updates:
    """Return the checked updates for all copies of all workers: those of the first worker."""
    checked = _checked(copies, verb, value_for_all(indices), value_for_all(updates), None)
    return Updates(*map(copies.placement.broadcast_from_chief, checked))


# -- arithmetic of rows --------------------------------------------------------------------------


class _RowChange(NamedTuple):
    """Row updates, in order, of copies that hold the same."""

    copies: Sequence[int]  # their indices
    parts: Sequence[Updates]


def _apply(copies: Copies, verb: str, changes: Sequence[_RowChange], divisor: int = 1) -> None:
    """Apply the updates, divided by a number, to the rows of copies: to all of them or none.

    float16 and bfloat16 are computed in float32 and rounded once.
    """
    arrays, memory = copies.arrays_to_scatter(), copies.memory
    began = 0 if tracing.active is None else tracing.active.begin("write")
    if memory is array_memory.HOST and debugging.active is None:
        kernel, dtype = backends.row_updates(), arrays[0].dtype
        if kernel.runner(verb, dtype) is not None:
            is_half = reduce_op.is_half(dtype)  # of which a list is rounded once
            writes = [
                kernel.RowWrite(
                    [arrays[k] for k in change.copies], indices, _apart(updates, arrays)
                )
                for change in changes
                for indices, updates in (
                    [_concatenated(copies, change.parts)] if is_half else change.parts
                )
            ]
            kernel.update_rows(verb, writes, divisor)
            if began:
                trace_write(began, [copies], _nbytes_of(changes))
            return
    targets, rows, values = [], [], []
    for change in changes:
        like, given = arrays[change.copies[0]], _concatenated(copies, change.parts)
        changed = memory.apply(_changed, like, memory.accumulate, verb, given, divisor)
        for k in change.copies:
            targets.append(arrays[k])
            rows.append(changed[0])
            values.append(changed[1])
    if debugging.active is not None:
        check_written(copies, values)
    if memory.is_immutable:
        _commit_rows(copies, changes, rows, values)
    else:
        memory.overwrite_rows(targets, rows, values)
    if began:
        trace_write(began, [copies], _nbytes_of(changes))


def _commit_rows(
    copies: Copies, changes: Sequence[_RowChange], rows: Sequence[Any], values: Sequence[Any]
) -> None:
    """Commit copies with other rows, of arrays that cannot be written."""
    changed = [k for change in changes for k in change.copies]
    new: list[Any] = [*copies.arrays]
    for k, where, content in zip(changed, rows, values, strict=True):
        near = copies.memory.to_device_of(content, new[k])
        new[k] = new[k].at[where].set(near)
    if len(changed) == 1 < len(new):  # a replica's own: others may write theirs meanwhile
        copies.commit_own(changed[0], new[changed[0]])
    else:
        copies.commit(new)


def _nbytes_of(changes: Sequence[_RowChange]) -> int:
    """Return the bytes of the rows that are changed, in all copies."""
    return sum(
        len(change.copies) * part.updates.nbytes for change in changes for part in change.parts
    )


def _apart(updates: HostArray, arrays: Sequence[Any]) -> HostArray:
    """Return the updates, or a copy if they share memory with one of the arrays."""
    shares = any(np.may_share_memory(updates, array) for array in arrays)
    return updates.copy() if shares else updates


def _none_of(given: Updates) -> Updates:
    return Updates(given.indices[:0], given.updates[:0])


def _concatenated(copies: Copies, parts: Sequence[Updates]) -> Updates:
    """Concatenate updates in order, on the first copy's device."""
    if len(parts) == 1:
        return parts[0]
    memory = copies.memory
    indices = np.concatenate([part.indices for part in parts])
    each = [memory.to_device_of(part.updates, copies.arrays[0]) for part in parts]
    return Updates(indices, memory.apply(lambda *arrays: np.concatenate(arrays), *each))


def _changed(
    array: Any, accumulate: Callable[..., Any], verb: str, given: Updates, divisor: int
) -> tuple[HostArray, Any]:
    """Return the rows that change and their new content; ``array`` is unchanged."""
    if verb == "scatter_update":  # the last of several updates of a row wins
        rows, last = np.unique(given.indices[::-1], return_index=True)
        return rows, given.updates[len(given.indices) - 1 - last]
    change = _CHANGES[verb]
    if change is np.divide and array.dtype.kind in "iu":
        change = np.floor_divide
    rows, positions = np.unique(given.indices, return_inverse=True)
    content, updates = _wide(array[rows]), _wide(given.updates)
    if divisor != 1:
        updates = updates / updates.dtype.type(divisor)
    content = accumulate(change, content, positions.reshape(-1), updates)
    return rows, content.astype(array.dtype, copy=False)


def _wide(array: Any) -> Any:
    return array.astype(reduce_op.working_dtype(array.dtype), copy=False)
