"""The gradients of a step: checked, and one column of the replicas' for each variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dvkernels import context, reduce_op
from dvkernels.devices.buffers import Spec, spec
from dvkernels.errors import (
    BufferMismatchError,
    CollectiveMismatchError,
    ContextError,
    ReduceOpError,
    SynchronizationError,
)
from dvkernels.profiler import debugging
from dvkernels.reduce_op import ReduceOp
from dvkernels.user_errors import shown
from dvkernels.values import regroup, replica_weights
from dvkernels.values.array_leaves import as_array
from dvkernels.values.distributed import DistributedValues, PerReplica
from dvkernels.variables.modes import VariableSynchronization
from dvkernels.variables.variable import Variable

__all__: list[str] = []

VERB = "apply_gradients"
Pair = tuple[Any, Variable]


def checked_op(op: Any) -> ReduceOp:
    """Return the mean or the sum; raise for another reduction."""
    known = reduce_op.parse(op)
    if known is ReduceOp.SUM or known is ReduceOp.MEAN:
        return known
    raise ReduceOpError(f"{VERB} reduces gradients by 'sum' or 'mean'; got {op!r}")


def listed(pairs: Any) -> list[Pair]:
    """Return pairs of a gradient and a variable; raise unless they are."""
    try:
        found = list(pairs)
    except TypeError as error:
        raise TypeError(
            f"{VERB} needs pairs of a gradient and a variable; got {shown(pairs)}: {error}"
        ) from error
    for pair in found:
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not is_pair or not isinstance(pair[1], Variable):
            raise TypeError(f"{VERB} needs pairs of a gradient and a variable; got {shown(pair)}")
    return [(pair[0], pair[1]) for pair in found]


def variables_of(pairs: Sequence[Pair], op: ReduceOp) -> list[Variable]:
    """Return the variables of pairs; raise unless they can be updated here."""
    frame = context.find()
    variables = [variable for _, variable in pairs]
    if len({id(variable) for variable in variables}) != len(variables):
        raise ContextError(f"{VERB}: a variable stands twice among the pairs; add up first")
    for variable in variables:
        if variable.synchronization is not VariableSynchronization.ON_WRITE:
            raise SynchronizationError(
                f"{VERB}: variable {variable.name!r} is {variable.synchronization.name}, so its "
                f"copies may differ; optimizers update ON_WRITE variables, whose copies are equal"
            )
        reduce_op.check_dtype(f"{VERB} of {variable.name!r}", op, variable.dtype)
        if frame and not context.is_outside(frame) and variable.owner is not frame.placement:
            raise ContextError(
                f"{VERB}: variable {variable.name!r} belongs to {variable.owner.name}, and this "
                f"runs under {frame.placement.name}; create it inside that strategy's scope"
            )
        if frame is None or frame.replica is None:
            context.check_no_step_elsewhere(variable.owner, f"{VERB} of variable {variable.name!r}")
        if variable.owner is not variables[0].owner:
            raise ContextError(
                f"{VERB}: variable {variable.name!r} belongs to {variable.owner.name}, "
                f"{variables[0].name!r} to {variables[0].owner.name}; update them apart"
            )
    return variables


def is_absent(gradient: Any, variable: Variable) -> bool:
    """Return whether there is no gradient for a variable, in cross-replica context."""
    if not isinstance(gradient, PerReplica):
        return gradient is None
    without = [rank for rank, part in enumerate(gradient.values) if part is None]
    if without and len(without) < len(gradient):
        raise CollectiveMismatchError(
            f"{VERB}: {variable.name!r} is without a gradient on replicas {without} of "
            f"{len(gradient)}; pass None on all of them, or zeros and a weight of 0"
        )
    return bool(without)


def weights_of(weight: Any, variables: Sequence[Variable], op: ReduceOp) -> list[float] | None:
    """Return the weight of each local replica, in cross-replica context; None: all are equal."""
    if weight is None:
        return None
    each = weight.values if isinstance(weight, PerReplica) else [weight]
    found = [replica_weights.checked(one, VERB, op) for one in each]
    if not variables:
        return None
    count = variables[0].owner.num_local
    if isinstance(weight, PerReplica):
        regroup.check_own(weight, variables[0].owner, f"{VERB}, weight: ")
    return found if isinstance(weight, PerReplica) else found * count


def columns_of(pairs: Sequence[Pair], each: Sequence[float] | None) -> tuple[list[list[Any]], bool]:
    """Return, in cross-replica context, one gradient per local replica for each variable.

    And whether there is one for all replicas instead, the first worker's. ``each`` is the
    replicas' weights.
    """
    columns: list[list[Any]] = []
    for gradient, variable in pairs:
        count, first = variable.owner.num_local, variable.owner.first_replica
        if isinstance(gradient, PerReplica):
            what = f"{VERB}, gradient of {variable.name!r}: "
            regroup.check_own(gradient, variable.owner, what)
            parts = list(gradient.values)
        else:
            parts = [gradient.at(0) if isinstance(gradient, DistributedValues) else gradient]
        counts = [True] * len(parts) if each is None or len(parts) < count else map(bool, each)
        columns.append(
            [
                checked(part, variable, replica, counts=does)
                for replica, (part, does) in enumerate(zip(parts, counts, strict=True), first)
            ]
        )
    if not any(isinstance(gradient, PerReplica) for gradient, _ in pairs):
        chosen = zip(columns, pairs, strict=True)
        return [[v.owner.broadcast_from_chief(gradient)] for (gradient,), (_, v) in chosen], True
    # One array for all counts as the mean of equal ones, beside gradients of each replica too.
    most = max(len(column) for column in columns)
    return [column * most if len(column) < most else column for column in columns], False


def checked(gradient: Any, variable: Variable, replica: int, *, counts: bool = True) -> Any:
    """Return a replica's gradient as an array that fits; ``counts`` unless its weight is 0."""
    held = variable.owner.memory
    array = as_array(gradient, VERB, replica, held)
    if array.dtype != variable.dtype or array.shape != variable.shape:
        raise BufferMismatchError(
            f"{VERB} expected a gradient of {variable.name!r} of "
            f"{Spec(variable.shape, variable.dtype)}, got {spec(array)} from replica {replica}; "
            f"cast with .astype or reshape it first"
        )
    if debugging.active is not None and counts:
        debugging.check_finite(f"{VERB}: the gradient of {variable.name!r}", [array])
    owner = variable.owner
    return held.on(array, owner.replica_devices[replica - owner.first_replica])
