"""Verbs: of each collective the checks, the terms on which the replicas must agree, and the action.

A verb of a replica checks its arguments. The replicas then meet with their terms, and the last one
to arrive performs the action for all. A verb in cross-replica context has the values of all
replicas of this process: it checks, and acts at once. The communicator checks nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dvkernels import pytree, reduce_op
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.bucketing import Bucketing
from dvkernels.context import Replica
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array, Spec, spec
from dvkernels.errors import BufferMismatchError
from dvkernels.kernels import checks
from dvkernels.profiler import debugging
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.values import axis_reduction, operands, regroup, replica_weights
from dvkernels.values.distributed import DistributedValues, Mirrored, PerReplica
from dvkernels.values.handle import Handle
from dvkernels.values.operands import ArrayLeaves
from dvkernels.values.placement import Placement
from dvkernels.values.scalar_checks import is_integer

__all__: list[str] = []

Column = Sequence[Array]  # one array per local replica
Payloads = list[Any]  # what each replica contributes to a call


def all_reduce(
    replica: Replica, op: Reduction | str, value: Any, weight: float | None, out: Any, shared: bool
) -> Any:
    """Reduce over the replicas; every replica gets the result."""
    if weight is not None:
        weight = replica_weights.checked(replica.own(weight), "all_reduce", _parsed(op))
    leaves, reduction = _reducible(replica, "all_reduce", op, value, counts=weight != 0)
    targets = None
    if out is not None:
        replica_id, memory = replica.replica_id_in_sync_group, replica.placement.memory
        targets = operands.targets_of(out, leaves, "all_reduce", replica_id, memory)
    if shared and out is not None:
        raise ValueError("all_reduce: out belongs to one replica, so it cannot be shared")
    placement, dtypes = replica.placement, [array.dtype for array in leaves.arrays]

    def act(payloads: Payloads) -> list[list[Array]]:
        columns: Sequence[Column] = _columns(payload[0] for payload in payloads)
        outs = None if targets is None else _columns(payload[1] for payload in payloads)
        kernel_op = reduction
        if weight is not None:
            weights = [payload[2] for payload in payloads]
            workers = placement.workers
            columns, kernel_op = weighted("all_reduce", workers, columns, kernel_op, weights)
        communicator = placement.communicator
        if not shared and all(
            column[0].dtype == dtype for column, dtype in zip(columns, dtypes, strict=True)
        ):
            reduced = all_reduce_each(communicator, columns, kernel_op, outs)
            return _per_replica_rows(reduced, len(payloads))
        results: list[Column] = []
        for k, column in enumerate(columns):
            into = None if outs is None else outs[k]
            if not shared and column[0].dtype == dtypes[k]:
                results.append(communicator.all_reduce(column, kernel_op, into))
                continue
            total: Any = communicator.reduce(column, kernel_op)
            total = total.astype(dtypes[k], copy=False)  # a weighted half type is in float32
            if shared:
                total = array_memory.holding(total).read_only(total)
                results.append([total] * len(payloads))
            else:
                results.append(_copy_for_each(total, into, column))
        return _per_replica_rows(results, len(payloads))

    terms = (
        reduction.value,
        leaves.structure,
        leaves.specs,
        "weighted" if weight is not None else None,
        "into out" if out is not None else None,
        "shared" if shared else None,
    )
    payload = (leaves.arrays, targets, weight)
    results = replica.meet(CollectiveCall("all_reduce", terms, payload, act))
    if targets is None:
        return _restored(leaves, results)
    if leaves.originals is not None:
        leaves.restored(targets)  # the streams of their libraries wait for the results
    return out


def all_reduce_async(replica: Replica, op: Reduction | str, value: Any) -> Handle:
    """Issue an all-reduce that the progress thread performs."""
    leaves, reduction = _reducible(replica, "all_reduce_async", op, value)
    communicator = replica.placement.async_communicator

    def act(payloads: Payloads) -> list[list[Array]]:
        reduced = all_reduce_each(communicator, _columns(payloads), reduction)
        return _per_replica_rows(reduced, len(payloads))

    terms = (reduction.value, leaves.structure, leaves.specs)
    call = CollectiveCall("all_reduce_async", terms, leaves.arrays, act)
    return replica.issue(call, leaves.restored)


def reduce_scatter(replica: Replica, op: Reduction | str, value: Any) -> Any:
    """Reduce over the replicas; replica r gets part r of the result."""
    leaves, reduction = _reducible(replica, "reduce_scatter", op, value)
    for array in leaves.arrays:
        if array.ndim == 0:
            raise BufferMismatchError(
                f"reduce_scatter splits along axis 0, and replica "
                f"{replica.replica_id_in_sync_group} passed a 0-d array; use all_reduce"
            )
    communicator = replica.placement.communicator

    def scatter(columns: Sequence[Column]) -> Sequence[Column]:
        return [communicator.reduce_scatter(column, reduction) for column in columns]

    return _collect(replica, "reduce_scatter", (reduction.value,), leaves, scatter)


def reduce(
    placement: Placement, op: Reduction | str, value: Any, axis: int | Sequence[int] | None = None
) -> Any:
    """Reduce one value per replica to one array, in cross-replica context."""
    reduction = _parsed(op)
    communicator = placement.communicator

    def reduce_leaf(leaf: Any) -> Array:
        arrays, original = operands.component_arrays("reduce", leaf, placement)
        if axis is not None:
            total = axis_reduction.reduce_along(
                reduction, arrays, axis, communicator, placement.workers
            )
        else:
            _check_dtype("reduce", reduction, arrays[0].dtype)
            _check_alike("reduce", arrays)
            total = communicator.reduce(arrays, reduction)
        return operands.in_library_of(total, original)

    return _map_leaves(reduce_leaf, value)


def all_reduce_each(
    communicator: Communicator,
    columns: Sequence[Column],
    op: Reduction,
    outs: Sequence[Column] | None = None,
) -> list[list[Array]]:
    """Return the all-reduce of each column, in buckets where the communicator packs them.

    The results are new arrays, or those of ``outs``, which may be the columns themselves.
    """
    if isinstance(communicator, Bucketing) and len(columns) > 1:
        return communicator.all_reduce_many(columns, op, outs)
    if outs is None:
        return [communicator.all_reduce(column, op) for column in columns]
    return [
        communicator.all_reduce(column, op, out) for column, out in zip(columns, outs, strict=True)
    ]


def weighted(
    verb: str, workers: Workers, columns: Sequence[Column], op: Reduction, weights: Sequence[float]
) -> tuple[Sequence[Column], Reduction]:
    """Return columns and the reduction that gives their weighted mean.

    Every worker must call this, with one weight per local replica.
    """
    shares = replica_weights.normalized_shares(weights, workers, verb)
    if shares is None:
        return columns, op
    return replica_weights.scaled_shares(columns, shares), ReduceOp.SUM


def all_gather(replica: Replica, value: Any, axis: int) -> Any:
    """Concatenate in replica order; every replica gets the whole."""
    replica_id, placement = replica.replica_id_in_sync_group, replica.placement
    leaves = _array_leaves(replica, "all_gather", value)
    for array in leaves.arrays:
        checks.check_dtype_moves("all_gather", array.dtype)
    arrays, axes, specs = operands.prepare_gather("all_gather", leaves.arrays, axis, replica_id)

    def concatenate(columns: Sequence[Column]) -> Sequence[Column]:
        return [
            placement.communicator.all_gather(
                operands.with_common_dtype(column, placement.workers), column_axis
            )
            for column, column_axis in zip(columns, axes, strict=True)
        ]

    leaves = leaves._replace(arrays=arrays, specs=specs)
    return _collect(replica, "all_gather", (axis,), leaves, concatenate)


def gather(placement: Placement, value: Any, axis: int) -> Any:
    """Concatenate one value per replica, in cross-replica context."""

    def gather_leaf(leaf: Any) -> Array:
        arrays, original = operands.component_arrays("gather", leaf, placement)
        ready, axes, specs = operands.prepare_gather("gather", arrays, axis, 0)
        for rank, spec_here in enumerate(specs):
            if spec_here != specs[0]:
                raise BufferMismatchError(
                    f"gather along axis {axis} needs one dtype, and one length along every "
                    f"other axis: replica 0 holds {specs[0]}, replica {rank} holds {spec_here}"
                )
        column = operands.with_common_dtype(ready, placement.workers)
        whole = placement.communicator.all_gather(column, axes[0])[0]
        return operands.in_library_of(whole, original)

    return _map_leaves(gather_leaf, value)


def broadcast(replica: Replica, value: Any, root: int) -> Any:
    """Send the value of replica ``root`` to every replica."""
    placement = replica.placement
    if not is_integer(root) or not 0 <= root < placement.num_replicas:
        raise ValueError(
            f"broadcast: root must be a replica id from 0 to {placement.num_replicas - 1}, "
            f"got {root!r} on replica {replica.replica_id_in_sync_group}"
        )
    leaves, source = _array_leaves(replica, "broadcast", value), int(root)

    def send(columns: Sequence[Column]) -> Sequence[Column]:
        return [placement.communicator.broadcast(column, source) for column in columns]

    return _collect(replica, "broadcast", (source,), leaves, send)


def broadcast_from_chief(placement: Placement, verb: str, leaf: Any) -> Array:
    """Return the one value of a leaf, the first worker's, as a new array."""
    if isinstance(leaf, DistributedValues):
        regroup.check_fits(leaf, placement, f"{verb}: ")
    whole: Any = leaf.read_value() if regroup.is_variable(leaf) else leaf
    if isinstance(whole, PerReplica):
        raise ValueError(
            f"{verb} mirrors one value, and a PerReplica holds one per replica; "
            f"choose it with .on(replica_id), or use reduce_to"
        )
    single = whole.at(0) if isinstance(whole, Mirrored) else whole
    array = placement.broadcast_from_chief(operands.as_array(single, verb, 0, placement.memory))
    copied: Array = array_memory.holding(array).copy_to_device_of(array, array)
    return copied


def barrier(replica: Replica) -> None:
    """Block until every replica of every worker has called this."""

    def act(payloads: Payloads) -> list[None]:
        replica.placement.workers.barrier()
        return [None] * len(payloads)

    replica.meet(CollectiveCall("barrier", (), None, act))


def _parsed(op: object) -> Reduction:
    """Return the reduction that ``op`` is or names."""
    named = reduce_op.BY_NAME.get(op) if type(op) is str else op  # the common case, without a call
    return named if type(named) is ReduceOp else reduce_op.parse(op)


def _check_dtype(verb: str, op: Reduction, dtype: np.dtype[Any]) -> None:
    if (op, dtype) not in reduce_op.SUPPORTED:  # the common case, without a call
        reduce_op.check_dtype(verb, op, dtype)


def _check_alike(verb: str, arrays: Sequence[Array]) -> None:
    shape, dtype = arrays[0].shape, arrays[0].dtype
    for rank, array in enumerate(arrays):
        if array.shape != shape or array.dtype != dtype:
            raise BufferMismatchError(
                f"{verb} needs one shape and dtype: replica {rank} holds {spec(array)}, replica "
                f"0 holds {spec(arrays[0])}; pad or cast first, or give the axis to reduce along"
            )


def _array_leaves(replica: Replica, verb: str, value: Any, *, counts: bool = True) -> ArrayLeaves:
    """Return the leaves of a replica's value; under ``dv.debug`` finite, if they count."""
    if type(value) is np.ndarray:  # the common case, without a call
        leaves = ArrayLeaves([value], None, Spec(value.shape, value.dtype), None)
    else:
        replica_id, memory = replica.replica_id_in_sync_group, replica.placement.memory
        leaves = operands.leaves_of(value, verb, replica_id, replica.own, memory)
    if debugging.active is not None and counts:
        debugging.check_finite(verb, leaves.arrays)
    return leaves


def _reducible(
    replica: Replica, verb: str, op: Reduction | str, value: Any, *, counts: bool = True
) -> tuple[ArrayLeaves, Reduction]:
    reduction = _parsed(op)
    leaves = _array_leaves(replica, verb, value, counts=counts)
    for array in leaves.arrays:
        _check_dtype(verb, reduction, array.dtype)
    return leaves, reduction


def _collect(
    replica: Replica,
    verb: str,
    terms: tuple[Any, ...],
    leaves: ArrayLeaves,
    collective: Callable[[Sequence[Column]], Sequence[Column]],
) -> Any:
    """Perform a collective, which takes a column per leaf and returns one, with all replicas."""

    def act(payloads: Payloads) -> list[list[Array]]:
        return _per_replica_rows(collective(_columns(payloads)), len(payloads))

    call = CollectiveCall(verb, (*terms, leaves.structure, leaves.specs), leaves.arrays, act)
    return _restored(leaves, replica.meet(call))


def _restored(leaves: ArrayLeaves, results: Sequence[Array]) -> Any:
    is_plain = leaves.structure is None and leaves.originals is None
    return results[0] if is_plain else leaves.restored(results)


def _columns(rows: Iterable[Sequence[Array]]) -> list[Column]:
    """Return one column per leaf, from one list of leaves per replica."""
    return [*zip(*rows, strict=True)]


def _per_replica_rows(columns: Sequence[Column], num_replicas: int) -> list[list[Array]]:
    """Return one list of leaves per replica, from one column per leaf."""
    return [[column[rank] for column in columns] for rank in range(num_replicas)]


def _map_leaves(fn: Callable[[Any], Array], value: Any) -> Any:
    return fn(value) if isinstance(value, DistributedValues) else pytree.map_leaves(fn, value)


def _copy_for_each(array: Array, into: Column | None, column: Column) -> Column:
    """Copy an array into each array of ``into``, or else next to each replica's own array."""
    memory = array_memory.holding(array)
    if into is None:
        return [memory.copy_to_device_of(array, own) for own in column]
    memory.overwrite(into, [array] * len(into))
    return into
