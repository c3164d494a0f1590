"""Scatter operations: writes of some rows of a variable, such as ``scatter_add``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dvkernels import context, reduce_op
from dvkernels.devices import interop
from dvkernels.devices.array_spec import Array, HostArray, Spec, refuse_masked, spec
from dvkernels.errors import BufferMismatchError, NotABufferError, SynchronizationError
from dvkernels.profiler import debugging
from dvkernels.replica_context import ReplicaContext
from dvkernels.user_errors import brief
from dvkernels.values.distributed import PerReplica
from dvkernels.variables.access import check_aggregation, write_together
from dvkernels.variables.copies import Copies, value_for_all
from dvkernels.variables.modes import VariableAggregation

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
    _check_additive(copies, verb)
    own = _checked_own(copies, verb, indices, updates, replica)

    def act(parts: list[Updates]) -> list[None]:
        placement, how = copies.placement, copies.aggregation
        applied: Sequence[Updates] = parts
        if how not in (VariableAggregation.SUM, VariableAggregation.MEAN):
            # those of replica 0, a replica of the first worker
            applied = parts[: 1 if placement.workers.rank == 0 else 0]
        own = _concatenated(copies, applied, parts[0])
        rows, content = (placement.workers.all_gather([array], 0)[0] for array in own)
        if how is VariableAggregation.MEAN and placement.num_replicas > 1:
            content = content / content.dtype.type(placement.num_replicas)
        _scatter_alike(copies, verb, Updates(rows, content))
        return [None] * len(parts)

    write_together(copies, verb, own, act, replica)


def scatter_own_copy(
    copies: Copies, verb: str, indices: Any, updates: Any, replica: ReplicaContext
) -> None:
    """Apply row updates to this replica's copy only."""
    own = copies.arrays[copies.index_of(replica.rank_in_process)]
    given = _checked_own(copies, verb, indices, updates, replica)
    rows, content = _new_rows(copies, own, verb, given)
    copies.memory.overwrite_rows([own], [rows], [content])


def scatter_every_copy_alike(copies: Copies, verb: str, indices: Any, updates: Any) -> None:
    """Apply the same row updates to every copy; a ``PerReplica`` raises."""
    _check_additive(copies, verb)
    if isinstance(indices, PerReplica) or isinstance(updates, PerReplica):
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: a PerReplica holds different values, and the "
            f"copies of an ON_WRITE variable are equal; scatter in a replica, or pass one array"
        )
    _scatter_alike(copies, verb, _checked_for_all(copies, verb, indices, updates))


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
    pairs = zip(copies.arrays, checked, strict=True)
    changes = [_new_rows(copies, own, verb, updates) for own, updates in pairs]
    copies.commit_rows([rows for rows, _ in changes], [content for _, content in changes])


def refuse_to_scatter(copies: Copies, verb: str, *_: object) -> NoReturn:
    """Raise: row updates are not defined for a variable whose value is an aggregate of copies."""
    raise SynchronizationError(
        f"{verb} of variable {copies.name!r}: it is ON_READ, which takes assign, assign_add and "
        f"assign_sub only; use synchronization='none' or 'on_write'"
    )


def _scatter_alike(copies: Copies, verb: str, given: Updates) -> None:
    rows, content = _new_rows(copies, copies.arrays[0], verb, given)
    copies.commit_rows([rows] * len(copies.arrays), [content] * len(copies.arrays))


# -- checks --------------------------------------------------------------------------------------


def _check_additive(copies: Copies, verb: str) -> None:
    combines = copies.aggregation in (VariableAggregation.SUM, VariableAggregation.MEAN)
    if verb in _NOT_ADDITIVE and combines and copies.placement is not context.UNSCOPED:
        raise SynchronizationError(
            f"{verb} of variable {copies.name!r}: aggregation {copies.aggregation.name} does not "
            f"say what the updates of several replicas make of a row; use 'only_first_replica', or "
            f"scatter_add, scatter_sub, scatter_mul or scatter_div"
        )


def checked_rows(copies: Copies, verb: str, indices: Any, replica: int | None) -> HostArray:
    """Return row indices as an integer array on the host; malformed or out of range they raise."""
    shape = copies.arrays[0].shape
    what = f"{verb} of variable {copies.name!r}"
    origin = "" if replica is None else f" from replica {replica}"
    if not shape:
        raise BufferMismatchError(f"{what}: a 0-d variable has no rows; use the whole value")
    refuse_masked(indices, f"{what}: the indices{origin}")
    rows = copies.memory.to_host(indices) if interop.is_on_gpu(indices) else np.asarray(indices)
    if rows.size == 0 and rows.dtype.kind == "f":
        rows = rows.astype(np.int64)  # an empty list
    if rows.dtype.kind not in "iu":
        raise NotABufferError(
            f"{what}: expected integers as indices, got {brief(indices, 60)}{origin}"
        )
    outside = rows[(rows < 0) | (rows >= shape[0])]
    if outside.size:
        raise IndexError(
            f"{what}: got index {outside.flat[0]}{origin}; the rows are 0 to {shape[0] - 1}, and "
            f"negative ones do not count from the end"
        )
    return rows


def _checked(copies: Copies, verb: str, indices: Any, updates: Any, replica: int | None) -> Updates:
    """Return the updates with flat indices; wrong indices, shapes or dtypes raise."""
    shape, dtype = copies.arrays[0].shape, copies.arrays[0].dtype
    what = f"{verb} of variable {copies.name!r}"
    rows = checked_rows(copies, verb, indices, replica)
    array = copies.converted(updates, verb, replica)
    expected = Spec((*rows.shape, *shape[1:]), dtype)
    is_number = isinstance(updates, (bool, int, float, complex)) and array.ndim == 0
    if is_number and array.dtype == dtype:
        array = np.broadcast_to(array, expected.shape)
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
    return Updates(rows.reshape(-1).astype(np.int64), near)


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


def _concatenated(copies: Copies, parts: Sequence[Updates], like: Updates) -> Updates:
    """Concatenate updates in order, on the first copy's device; without parts, none of ``like``."""
    if not parts:
        return Updates(like.indices[:0], _wide(like.updates[:0]))
    memory = copies.memory
    indices = np.concatenate([part.indices for part in parts])
    each = [_wide(memory.to_device_of(part.updates, copies.arrays[0])) for part in parts]
    return Updates(indices, memory.apply(lambda *arrays: np.concatenate(arrays), *each))


def _new_rows(copies: Copies, array: Array, verb: str, given: Updates) -> tuple[HostArray, Any]:
    """Return the rows that change and their new content; ``array``, a copy, is unchanged.

    float16 and bfloat16 are computed in float32 and rounded once.
    """
    rows, content = copies.memory.apply(_changed, array, copies.memory.accumulate, verb, given)
    return rows, content


def _changed(
    array: Any, accumulate: Callable[..., None], verb: str, given: Updates
) -> tuple[HostArray, Any]:
    if verb == "scatter_update":  # the last of several updates of a row wins
        rows, last = np.unique(given.indices[::-1], return_index=True)
        return rows, given.updates[len(given.indices) - 1 - last]
    change = _CHANGES[verb]
    if change is np.divide and array.dtype.kind in "iu":
        change = np.floor_divide
    rows, positions = np.unique(given.indices, return_inverse=True)
    content = _wide(array[rows])
    updates = given.updates.astype(content.dtype, copy=False)
    accumulate(change, content, positions.reshape(-1), updates)
    return rows, content.astype(array.dtype, copy=False)


def _wide(array: Any) -> Any:
    return array.astype(reduce_op.working_dtype(array.dtype), copy=False)
