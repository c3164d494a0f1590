"""Checks of the gradients of a step, and their columns: per variable, one gradient per replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dvkernels import context, reduce_op, user_errors, verbs
from dvkernels.devices.array_spec import Array, Spec, spec
from dvkernels.errors import (
    BufferMismatchError,
    CollectiveMismatchError,
    ContextError,
    ReduceOpError,
    SynchronizationError,
    UnsupportedDTypeError,
)
from dvkernels.optimizers import row_gradient
from dvkernels.profiler import debugging
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.replicas.collective_call import Same
from dvkernels.user_errors import brief
from dvkernels.values import regroup, replica_weights
from dvkernels.values.distributed import DistributedValues, PerReplica
from dvkernels.values.operands import as_array
from dvkernels.values.placement import Placement
from dvkernels.variables.modes import VariableSynchronization
from dvkernels.variables.variable import Variable, storage_of

__all__: list[str] = []

VERB = "apply_gradients"
Pair = tuple[Any, Variable]


def checked_op(op: Any) -> ReduceOp:
    """Return the reduction, which must be the mean or the sum."""
    known = reduce_op.parse(op)
    if known is ReduceOp.SUM or known is ReduceOp.MEAN:
        return known
    raise ReduceOpError(f"{VERB} reduces gradients by 'sum' or 'mean'; got {op!r}")


def checked_pairs(pairs: Any) -> list[Pair]:
    """Return pairs of a gradient and a variable as a list; raise for anything else."""
    try:
        found = list(pairs)
    except TypeError as error:
        raise TypeError(
            f"{VERB} needs pairs of a gradient and a variable; got {brief(pairs)}: {error}"
        ) from error
    for pair in found:
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not is_pair or not isinstance(pair[1], Variable):
            raise TypeError(f"{VERB} needs pairs of a gradient and a variable; got {brief(pair)}")
    return [(pair[0], pair[1]) for pair in found]


def variables_of(pairs: Sequence[Pair], op: ReduceOp) -> list[Variable]:
    """Return the variables of pairs; raise unless all can be updated in this context."""
    frame = context.find()
    variables = [variable for _, variable in pairs]
    if len({id(variable) for variable in variables}) != len(variables):
        raise ContextError(
            f"{VERB}: a variable occurs twice among the pairs; add up its gradients first"
        )
    for variable in variables:
        if variable.synchronization is not VariableSynchronization.ON_WRITE:
            raise SynchronizationError(
                f"{VERB}: variable {variable.name!r} is {variable.synchronization.name}, so its "
                f"copies may differ; optimizers update ON_WRITE variables, whose copies are equal"
            )
        reduce_op.check_dtype(f"{VERB} of {variable.name!r}", op, variable.dtype)
        if variable.dtype.char not in "fd":
            raise UnsupportedDTypeError(
                f"{VERB} of {variable.name!r}: expected the mean or sum of float32 or float64, got "
                f"the {op.name} of {variable.dtype}; cast to float32 first"
            )
        if frame and not context.is_outside(frame) and variable.owner is not frame.placement:
            raise ContextError(
                f"{VERB}: variable {variable.name!r} belongs to {variable.owner.name}, but the "
                f"call is under {frame.placement.name}; create it inside that strategy's scope"
            )
        if frame is None or frame.replica is None:
            context.check_no_step_elsewhere(variable.owner, f"{VERB} of variable {variable.name!r}")
        if variable.owner is not variables[0].owner:
            raise ContextError(
                f"{VERB}: variable {variable.name!r} belongs to {variable.owner.name}, "
                f"{variables[0].name!r} to {variables[0].owner.name}; update them in separate calls"
            )
    return variables


def is_absent(gradient: Any, variable: Variable) -> bool:
    """Return whether a gradient given in cross-replica context is None, on all replicas."""
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
    """Return the weight of each local replica, in cross-replica context; None for equal weights."""
    if weight is None:
        return None
    given = weight.values if isinstance(weight, PerReplica) else [weight]
    weights = [replica_weights.checked(each, VERB, op) for each in given]
    if not variables:
        return None
    count = variables[0].owner.num_local
    if isinstance(weight, PerReplica):
        regroup.check_fits(weight, variables[0].owner, f"{VERB}, weight: ")
    return weights if isinstance(weight, PerReplica) else weights * count


def columns_of(
    pairs: Sequence[Pair], weights: Sequence[float] | None
) -> tuple[list[list[Any]], bool]:
    """Return the column of each variable, in cross-replica context: a gradient per local replica.

    Also return whether the columns hold a single gradient for all replicas of all workers instead,
    the first worker's. ``weights`` are those of the local replicas.
    """
    columns: list[list[Any]] = []
    for gradient, variable in pairs:
        count, first = variable.owner.num_local, variable.owner.first_replica
        if isinstance(gradient, PerReplica):
            what = f"{VERB}, gradient of {variable.name!r}: "
            regroup.check_fits(gradient, variable.owner, what)
            parts = list(gradient.values)
        else:
            parts = [gradient.at(0) if isinstance(gradient, DistributedValues) else gradient]
        is_single = len(parts) < count
        counts = [True] * len(parts) if weights is None or is_single else map(bool, weights)
        columns.append(
            [
                checked(part, variable, replica, counts=contributes)
                for replica, (part, contributes) in enumerate(
                    zip(parts, counts, strict=True), first
                )
            ]
        )
    if not any(isinstance(gradient, PerReplica) for gradient, _ in pairs):
        chosen = zip(columns, pairs, strict=True)
        return [[v.owner.broadcast_from_chief(gradient)] for (gradient,), (_, v) in chosen], True
    # Among columns of several gradients, a single gradient is repeated for every replica.
    length = max(len(column) for column in columns)
    return [column * length if len(column) < length else column for column in columns], False


def terms_of(pairs: Sequence[Pair]) -> Iterator[Any]:
    """Yield what all replicas must agree on: the variables, and which have no gradient."""
    for gradient, variable in pairs:
        yield f"{variable.name} without a gradient" if gradient is None else variable.name
        yield Same(id(variable))


def reduced_over_workers(
    owner: Placement, columns: Sequence[Sequence[Array]], op: Reduction, absent: Sequence[str]
) -> list[list[Array]]:
    """Return columns of one gradient, reduced over all replicas of all workers.

    ``absent`` names the variables without a gradient, for the error of workers that disagree.
    """
    try:
        reduced = verbs.all_reduce_each(owner.communicator, columns, op)
    except CollectiveMismatchError as error:
        where = f"{VERB} on worker {owner.workers.rank}"
        user_errors.annotate(error, f"{where}: variables without a gradient: {absent or 'none'}")
        raise
    return [copies[:1] for copies in reduced]


def checked(gradient: Any, variable: Variable, replica: int, *, counts: bool = True) -> Any:
    """Return a replica's gradient as an array on its device, of the variable's shape and dtype.

    ``counts`` is whether its weight is not 0: only then must it be finite under ``dv.debug``.
    """
    if type(gradient) is tuple and len(gradient) == 2 and storage_of(variable).server is not None:
        return row_gradient.checked(VERB, gradient, variable, replica)
    memory = variable.owner.memory
    array = as_array(gradient, VERB, replica, memory)
    if array.dtype != variable.dtype or array.shape != variable.shape:
        raise BufferMismatchError(
            f"{VERB} expected a gradient of {variable.name!r} of "
            f"{Spec(variable.shape, variable.dtype)}, got {spec(array)} from replica {replica}; "
            f"cast with .astype or reshape it first"
        )
    if debugging.active is not None and counts:
        debugging.check_finite(f"{VERB}: the gradient of {variable.name!r}", [array])
    owner = variable.owner
    return memory.on(array, owner.replica_devices[replica - owner.first_replica])
