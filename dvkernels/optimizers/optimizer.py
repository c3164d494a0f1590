"""What every optimizer does: bring the replicas' gradients together, and update all copies."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dvkernels import context, reduce_op
from dvkernels.communicators.bucketing import all_reduce_each
from dvkernels.communicators.rendezvous import Request, Same
from dvkernels.context import ReplicaContext
from dvkernels.devices.buffers import Spec, spec
from dvkernels.errors import (
    BufferMismatchError,
    ContextError,
    ReduceOpError,
    SynchronizationError,
)
from dvkernels.kernels import twins
from dvkernels.profiler import debugging
from dvkernels.reduce_op import ReduceOp
from dvkernels.user_errors import shown
from dvkernels.values import regroup
from dvkernels.values.arrays import as_array
from dvkernels.values.distributed import DistributedValues, PerReplica
from dvkernels.variables.modes import VariableSynchronization
from dvkernels.variables.variable import Variable, companion, copies_of

__all__ = ["Optimizer"]

_VERB = "apply_gradients"
LearningRate = float | Callable[[int], float]


class Optimizer(abc.ABC):
    """Updates variables from gradients; :class:`SGD`, :class:`Adam` and :class:`AdamW` are such.

    Its slots (velocities, moments) are variables that live like the ones they belong to: as many
    copies, on the same devices. They are made at the first step.
    """

    def __init__(self, learning_rate: LearningRate) -> None:
        if not callable(learning_rate):
            checked(learning_rate, "learning_rate", 0)
        self._learning_rate = learning_rate
        self._iterations = 0
        # By identity: variables compare elementwise. The variable is kept alive with its slots.
        self._slots: dict[int, tuple[Variable, tuple[Variable, ...]]] = {}

    @property
    def iterations(self) -> int:
        """The number of steps taken."""
        return self._iterations

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        rate = self._learning_rate
        return checked(rate(self._iterations) if callable(rate) else rate, "learning_rate", 0)

    def slots(self, variable: Variable) -> tuple[Variable, ...]:
        """Return the slots of a variable, in the order of :attr:`slot_names`; zeros at first."""
        found = self._slots.get(id(variable))
        if found is None:
            made = tuple(companion(variable, name) for name in self.slot_names)
            found = self._slots[id(variable)] = variable, made
        return found[1]

    @property
    def slotted(self) -> tuple[Variable, ...]:
        """The variables that have slots, in the order in which they got them."""
        return tuple(variable for variable, _ in self._slots.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the slots: the number of steps, as plain data.

        Learning rate, momentum and the like are the program's, and not part of it.
        """
        return {"iterations": self._iterations, "slot_names": list(self.slot_names)}

    def load_state_dict(self, state: Any) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            It is not such a state, or that of an optimizer with other slots. Nothing has changed.
        """
        iterations = state.get("iterations") if isinstance(state, dict) else None
        if type(iterations) is not int or iterations < 0:
            raise ValueError(f"expected the state of an optimizer; got {shown(state)}")
        if state.get("slot_names") != list(self.slot_names):
            raise ValueError(
                f"expected the state of an optimizer with the slots {list(self.slot_names)}; got "
                f"one with {shown(state.get('slot_names'), 200)}; make the optimizer as it was"
            )
        self._iterations = iterations

    @property
    @abc.abstractmethod
    def slot_names(self) -> tuple[str, ...]:
        """What it keeps for each variable."""

    @abc.abstractmethod
    def _update(
        self,
        kernels: Any,
        gradients: Sequence[Any],
        states: Sequence[Sequence[Any]],
        op: ReduceOp,
    ) -> None:
        """Take the step: ``states[0]`` holds the variables' copies, then come the slots'."""

    def apply_gradients(
        self, pairs: Iterable[tuple[Any, Variable]], op: ReduceOp | str = "mean"
    ) -> None:
        """Reduce the gradients over the replicas and update the variables, in one pass.

        Parameters
        ----------
        pairs : iterable of (gradient, variable)
            In a replica its own gradients, and all replicas call this with the same variables.
            In cross-replica context each gradient is a ``PerReplica``, or one array for all. The
            variables are float32 or float64 and ON_WRITE; gradients have their shape and dtype.
        op : ReduceOp or str
            How the replicas' gradients become one: ``"mean"`` or ``"sum"``.

        Raises
        ------
        BufferMismatchError, NotABufferError, UnsupportedDTypeError
            A gradient does not fit its variable.
        SynchronizationError
            A variable is not ON_WRITE: its copies may differ.
        ReduceOpError
            Another op.
        ContextError
            A variable of another strategy; the same variable twice.
        CollectiveMismatchError
            The replicas brought different variables.

        Notes
        -----
        After an error all variables, slots and :attr:`iterations` are as before.

        Examples
        --------
        >>> import dvkernels as dv
        >>> import numpy as np
        >>> sgd = dv.optimizers.SGD(0.5)
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     with strategy.scope():
        ...         weight = dv.Variable(np.ones(2))
        ...     def step(gradient):
        ...         sgd.apply_gradients([(gradient * np.ones(2), weight)])
        ...     strategy.run(step, (dv.PerReplica([1.0, 3.0]),))
        ...     print(weight.numpy())
        [0. 0.]
        """
        listed = list(pairs)
        reduction = _checked_op(op)
        variables = [_checked_variable(pair) for pair in listed]
        if len({id(variable) for variable in variables}) != len(variables):
            raise ContextError(f"{_VERB}: a variable stands twice among the pairs; add up first")
        gradients = [gradient for gradient, _ in listed]
        for variable in variables:
            reduce_op.check_dtype(f"{_VERB} of {variable.name!r}", reduction, variable.dtype)
        replica = _replica_of(variables)
        if replica is None:
            columns, is_one_for_all = _columns(gradients, variables)
            if not is_one_for_all:
                columns = _over_workers(variables, columns, reduction)
            self._step(variables, columns, reduction)
            return
        rank, name = replica.rank_in_process, replica.replica_id_in_sync_group
        own = [
            _checked_gradient(regroup.own_component(gradient, rank), variable, name)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]

        def act(payloads: list[list[Any]]) -> list[None]:
            columns = [list(column) for column in zip(*payloads, strict=True)]
            self._step(variables, _over_workers(variables, columns, reduction), reduction)
            return [None] * len(payloads)

        named = (term for v in variables for term in (v.name, Same(id(v))))
        terms = (Same(id(self)), reduction.value, *named)
        replica.meet(Request(_VERB, terms, own, act))

    def _step(self, variables: list[Variable], columns: list[list[Any]], op: ReduceOp) -> None:
        """Take one step; ``columns[k]`` holds the replicas' gradients of variable k."""
        if not variables:
            return
        slots = [self.slots(variable) for variable in variables]
        states = [[copies_of(variable) for variable in variables]]
        states += [[copies_of(slot) for slot in column] for column in zip(*slots, strict=True)]
        self._update(twins.of(states[0][0][0]).optimizers, columns, states, op)
        self._iterations += 1


def checked(number: Any, name: str, least: float, below: float = float("inf")) -> float:
    """Return a setting as a float in ``[least, below)``, else raise ValueError."""
    try:
        value = float(number)
    except (TypeError, ValueError):
        value = float("nan")
    if not least <= value < below:
        limits = f"at least {least:g}" + (f" and below {below:g}" if below < float("inf") else "")
        raise ValueError(f"{name} must be a finite number, {limits}; got {number!r}")
    return value


def _checked_op(op: Any) -> ReduceOp:
    known = reduce_op.parse(op)
    if known is ReduceOp.SUM or known is ReduceOp.MEAN:
        return known
    raise ReduceOpError(f"{_VERB} reduces gradients by 'sum' or 'mean'; got {op!r}")


def _checked_variable(pair: Any) -> Variable:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[1], Variable):
        raise TypeError(f"{_VERB} needs pairs of a gradient and a variable; got {shown(pair)}")
    variable: Variable = pair[1]
    if variable.synchronization is not VariableSynchronization.ON_WRITE:
        raise SynchronizationError(
            f"{_VERB}: variable {variable.name!r} is {variable.synchronization.name}, so its "
            f"copies may differ; optimizers update ON_WRITE variables, whose copies are equal"
        )
    return variable


def _replica_of(variables: Sequence[Variable]) -> ReplicaContext | None:
    """Return the replica that acts here, None for cross-replica context or no strategy."""
    frame = context.find()
    for variable in variables:
        placement = context.UNSCOPED if frame is None else frame.placement
        is_own = variable.owner is placement or (frame is None and variable.owner is not None)
        if not is_own:
            raise ContextError(
                f"{_VERB}: variable {variable.name!r} belongs to {variable.owner.name}, and this "
                f"runs under {placement.name}; create it inside that strategy's scope"
            )
        if frame is None or frame.replica is None:
            context.check_turn(variable.owner, f"{_VERB} of variable {variable.name!r}")
    return None if frame is None else frame.replica


def _over_workers(
    variables: list[Variable], columns: list[list[Any]], op: ReduceOp
) -> list[list[Any]]:
    """Return the gradients that are left to reduce here: all, or the sum or mean of all workers.

    The fused kernels reduce those of one process in the pass that updates the variables.
    """
    if not variables or variables[0].owner.workers.size == 1:
        return columns
    reduced = all_reduce_each(variables[0].owner.communicator, columns, op)
    return [copies[:1] for copies in reduced]


def _columns(
    gradients: Sequence[Any], variables: Sequence[Variable]
) -> tuple[list[list[Any]], bool]:
    """Return, in cross-replica context, one gradient per local replica for each variable.

    And whether there is one for all replicas instead, the first worker's.
    """
    columns: list[list[Any]] = []
    for gradient, variable in zip(gradients, variables, strict=True):
        count = variable.owner.num_local
        if isinstance(gradient, PerReplica):
            if len(gradient) != count:
                raise ContextError(
                    f"{_VERB}: the gradient of {variable.name!r} is a PerReplica of "
                    f"{len(gradient)}, and its strategy has {count} replicas"
                )
            parts = list(gradient.values)
        else:
            parts = [gradient.at(0) if isinstance(gradient, DistributedValues) else gradient]
        columns.append([_checked_gradient(part, variable, k) for k, part in enumerate(parts)])
    if not any(isinstance(gradient, PerReplica) for gradient in gradients):
        chosen = zip(columns, variables, strict=True)
        return [[v.owner.of_chief(gradient)] for (gradient,), v in chosen], True
    # One array for all counts as the mean of equal ones, beside gradients of each replica too.
    most = max(len(column) for column in columns)
    return [column * most if len(column) < most else column for column in columns], False


def _checked_gradient(gradient: Any, variable: Variable, replica: int) -> Any:
    held = variable.owner.memory
    array = as_array(gradient, _VERB, replica, held)
    if array.dtype != variable.dtype or array.shape != variable.shape:
        raise BufferMismatchError(
            f"{_VERB} expected a gradient of {variable.name!r} of "
            f"{Spec(variable.shape, variable.dtype)}, got {spec(array)} from replica {replica}; "
            f"cast with .astype or reshape it first"
        )
    if debugging.active is not None:
        debugging.check_finite(f"{_VERB}: the gradient of {variable.name!r}", [array])
    owner = variable.owner
    return held.on(array, owner.replica_devices[replica - owner.first_replica])
