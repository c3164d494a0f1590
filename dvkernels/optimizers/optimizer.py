"""Base class of optimizers: reduce the replicas' gradients, and update all copies of variables."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, Self

from dvkernels import context, verbs
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array
from dvkernels.errors import ContextError
from dvkernels.kernels import backends, update_rules
from dvkernels.optimizers import gradients, saved_state
from dvkernels.optimizers.slots import Slots, VariableState
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.replicas.collective_call import CollectiveCall, Same
from dvkernels.user_errors import brief
from dvkernels.values import function_checks, replica_weights, scalar_checks
from dvkernels.variables.variable import Variable, copies_of

__all__ = ["Optimizer"]

LearningRate = float | Callable[[int], float]
Columns = Sequence[Sequence[Array]]  # of each variable a gradient per replica, or its copies


class Optimizer(abc.ABC):
    """Base class of :class:`SGD`, :class:`Adam` and :class:`AdamW`.

    Slots (velocities, moments) are variables with a copy on each device of their variable. They
    are created at a variable's first step, and deleted with it.

    Notes
    -----
    Each variable has its own step count, which is passed to a callable learning rate. So a variable
    that joins later, or is updated only sometimes, is updated as if it were the only one.

    ``copy.deepcopy`` copies slots and step counts. They belong to the copies of the variables that
    the same call copies, ``copy.deepcopy((model, optimizer))``, in any order; for variables that it
    does not copy, they belong to the variables themselves.
    """

    def __init__(self, learning_rate: LearningRate) -> None:
        if callable(learning_rate):
            function_checks.check("learning_rate", learning_rate)
        else:
            learning_rate = scalar_checks.within(learning_rate, "learning_rate", 0)
        self._learning_rate = learning_rate
        self._iterations = 0
        self._slots = Slots()

    @property
    def iterations(self) -> int:
        """Largest step count of a variable."""
        return self._iterations

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step of a variable that has taken :attr:`iterations` steps."""
        return self._rates([self._iterations])[0]

    def _rates(self, steps: Sequence[int]) -> list[float]:
        """Return the learning rate of each variable; a callable is called once per step count."""
        rate = self._learning_rate
        if not callable(rate):
            return [rate] * len(steps)
        rates = {count: rate(count) for count in dict.fromkeys(steps)}
        return [scalar_checks.within(rates[count], "learning_rate", 0) for count in steps]

    def slots(self, variable: Variable) -> tuple[Variable, ...]:
        """Return the slots of a variable, in the order of :attr:`slot_names`; zeros at first."""
        names = self.slot_names
        state = self._state_of("slots", variable)
        return tuple(state.slots[name] for name in names)

    def steps(self, variable: Variable) -> Any:
        """Return the step count of a variable, an int64 array of shape ()."""
        return self._state_of("steps", variable).steps

    def _state_of(self, verb: str, variable: Variable) -> VariableState:
        if not isinstance(variable, Variable):
            raise TypeError(f"{verb} belong to variables; got {brief(variable)}")
        if not self._slots.has(variable):
            self._check_cross_replica(f"{verb} of variable {variable.name!r}, which has none yet")
        return self._slots.states_of([variable], self.slot_names)[0]

    def _check_cross_replica(self, verb: str) -> None:
        """Raise in replica context, where each replica would create its own slots."""
        frame = context.find()
        if frame is not None and frame.replica is not None:
            raise ContextError(
                f"{verb}, in replica {frame.replica.replica_id_in_sync_group}: each replica would "
                f"make its own; call it outside of run or in merge_call"
            )

    @property
    def slotted(self) -> tuple[Variable, ...]:
        """Variables that have taken steps, in the order of their first steps."""
        return tuple(variable for variable, _ in self._slots.living())

    def __copy__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} has no shallow copy: both would update the same slots; use "
            f"copy.deepcopy, for the variables too if the copy is to update copies of them"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = object.__new__(type(self))
        memo[id(self)] = made
        vars(made).update((name, copy.deepcopy(value, memo)) for name, value in vars(self).items())
        return made

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: its slots belong to variables; save "
            f"state_dict(), or the whole run with dv.Checkpoint"
        )

    # -- states ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return step counts and slots as plain data and arrays, for :meth:`load_state_dict`.

        ``"variables"`` lists, for each variable that has taken steps, in the order of their first
        steps, its ``"name"``, ``"shape"``, ``"dtype"`` and ``"steps"``, and its ``"slots"``, an
        array by name. Arguments such as learning rate and momentum are not part of the state.
        """
        entries = [
            saved_state.make_entry(variable, int(state.steps), state.slots, self.slot_names)
            for variable, state in self._slots.living()
        ]
        return {
            "iterations": self._iterations,
            "slot_names": list(self.slot_names),
            "variables": [*entries, *copy.deepcopy(self._slots.pending)],
        }

    def load_state_dict(self, state: Any, variables: Sequence[Variable] | None = None) -> None:
        """Load a state that :meth:`state_dict` returned.

        Parameters
        ----------
        state : dict
        variables : sequence of Variable, optional
            The variables of the state: as many as the state holds, in its order. If not given,
            variables are matched by name: those that have taken steps with this optimizer now, and
            others at their first step. A state of the same list of variables needs no unique names.

        Raises
        ------
        ValueError
            Not a state of an optimizer, that of an optimizer with other slots, or one that does not
            match the variables. Nothing has changed.
        ContextError
            Called in a replica.

        Notes
        -----
        A new variable that is not in the state begins with zeros, unless the state still holds an
        unmatched variable of its shape and dtype under another name: then ``apply_gradients``
        raises ``ValueError``, since the two may be the same variable.
        """
        self._check_cross_replica("load_state_dict")
        iterations = saved_state.checked_progress(state, self.slot_names)
        entries = saved_state.checked_entries(state.get("variables"), self.slot_names)
        known = self.slotted if variables is None else tuple(variables)
        matched, pending = saved_state.match_entries(
            entries, known, is_ordered=variables is not None
        )
        self._slots = Slots.from_entries(matched, pending, self.slot_names)
        self._iterations = iterations

    def progress(self) -> dict[str, Any]:
        """Return the state that a checkpoint saves besides the slots and steps of variables."""
        pending = copy.deepcopy(self._slots.pending)
        state = {"iterations": self._iterations, "slot_names": list(self.slot_names)}
        return {**state, "pending": pending} if pending else state

    def set_progress(self, state: Any) -> None:
        """Load a state that :meth:`progress` returned; raise ValueError for anything else."""
        iterations = saved_state.checked_progress(state, self.slot_names)
        self._slots.pending = saved_state.checked_entries(state.get("pending", []), self.slot_names)
        self._iterations = iterations

    @property
    @abc.abstractmethod
    def slot_names(self) -> tuple[str, ...]:
        """Names of the slots of each variable."""

    @abc.abstractmethod
    def _rule(self, parameters: Columns, steps: Sequence[int]) -> update_rules.Rule:
        """Return the update rule and each variable's coefficients.

        ``parameters`` holds the copies of each variable, ``steps`` the step counts of the variables
        before this step.
        """

    def apply_gradients(
        self,
        pairs: Iterable[tuple[Any, Variable]],
        *,
        op: ReduceOp | str = "mean",
        weight: Any = None,
    ) -> None:
        """Reduce the gradients over the replicas and update the variables, in one pass.

        Parameters
        ----------
        pairs : iterable of (gradient, variable)
            In replica context the gradients of this replica; all replicas call this with the same
            variables. In cross-replica context each gradient is a ``PerReplica``, or one array for
            all replicas. Variables are float32 or float64 and ON_WRITE; a gradient has the shape
            and dtype of its variable. A gradient of None, on all replicas, leaves its variable
            unchanged: it takes no step.
        op : ReduceOp or str
            Reduction over the replicas: ``"mean"`` or ``"sum"``.
        weight : float, optional
            Weight of this replica's gradients in the mean, as for ``all_reduce``: the number of its
            rows where batches are uneven. In cross-replica context a ``PerReplica``.

        Raises
        ------
        BufferMismatchError, NotABufferError, UnsupportedDTypeError
            A gradient does not match its variable.
        SynchronizationError
            A variable is not ON_WRITE: its copies may differ.
        ReduceOpError
            Another op.
        ContextError
            A variable of another strategy; the same variable twice.
        CollectiveMismatchError
            The replicas pass different variables, or None on some of them only.
        ValueError
            A weight that is not a finite number of at least 0, all weights 0, or a weight with
            ``"sum"``.

        Notes
        -----
        After an error all variables, slots and step counts are as before.

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
        reduction = gradients.checked_op(op)
        checked_pairs = gradients.checked_pairs(pairs)
        frame = context.find()
        replica = None if frame is None else frame.replica
        if replica is None:
            self._apply_cross_replica(checked_pairs, reduction, weight)
            return
        if weight is not None:
            weight = replica_weights.checked(replica.own(weight), gradients.VERB, reduction)
        own = [(replica.own(gradient), variable) for gradient, variable in checked_pairs]
        present = [pair for pair in own if pair[0] is not None]
        variables = gradients.variables_of(present, reduction)
        replica_id, counts = replica.replica_id_in_sync_group, weight != 0
        on_device = [gradients.checked(*pair, replica_id, counts=counts) for pair in present]
        absent = [variable.name for gradient, variable in own if gradient is None]

        def act(payloads: list[Any]) -> list[None]:
            columns = [list(column) for column in zip(*(p[0] for p in payloads), strict=True)]
            weights = None if weight is None else [payload[1] for payload in payloads]
            self._reduce(variables, columns, reduction, weights, absent)
            return [None] * len(payloads)

        weighted = None if weight is None else "weighted"
        terms = (Same(id(self)), reduction.value, weighted, *gradients.terms_of(own))
        replica.meet(CollectiveCall(gradients.VERB, terms, (on_device, weight), act))

    def _apply_cross_replica(self, pairs: list[gradients.Pair], op: ReduceOp, weight: Any) -> None:
        """Take a step in cross-replica context, or outside every scope."""
        present = [pair for pair in pairs if not gradients.is_absent(*pair)]
        variables = gradients.variables_of(present, op)
        weights = gradients.weights_of(weight, variables, op)
        columns, is_one_for_all = gradients.columns_of(present, weights)
        if not is_one_for_all:
            absent = [v.name for _, v in pairs if all(v is not other for other in variables)]
            self._reduce(variables, columns, op, weights, absent)
            return
        if weights is not None:  # checked only: the weighted mean of equal gradients is the same
            replica_weights.normalized_shares(weights, variables[0].owner.workers, gradients.VERB)
        self._step(variables, columns, op, None)

    def _reduce(
        self,
        variables: list[Variable],
        columns: Columns,
        op: Reduction,
        weights: list[float] | None,
        absent: list[str],
    ) -> None:
        """Take a step with gradients of all replicas; ``weights`` are those of the local replicas.

        In a single process the fused kernels reduce the gradients while they update the variables;
        over several workers the gradients are reduced first.
        """
        if not variables:
            return
        owner, shares = variables[0].owner, None
        is_single = owner.workers.size == 1
        if weights is not None and is_single and owner.memory is array_memory.HOST:
            shares = replica_weights.normalized_shares(weights, owner.workers, gradients.VERB)
        elif weights is not None:
            columns, op = verbs.weighted(gradients.VERB, owner.workers, columns, op, weights)
        if not is_single:
            columns = gradients.reduced_over_workers(owner, columns, op, absent)
        self._step(variables, columns, op, shares)

    def _step(
        self, variables: list[Variable], columns: Columns, op: Reduction, shares: list[float] | None
    ) -> None:
        """Take one step; ``columns[k]`` holds the replicas' gradients of variable k."""
        if not variables:
            return
        names = self.slot_names
        variable_states = self._slots.states_of(variables, names)
        states = [[copies_of(variable) for variable in variables]]
        states += [[copies_of(each.slots[name]) for each in variable_states] for name in names]
        # A writable gradient shares no element with variables and slots: users get read-only views
        # of these. So nothing is left for the kernel to check.
        is_writable = variables[0].owner.memory.is_writable
        is_checked = all(is_writable(gradient) for column in columns for gradient in column)
        weighting = {} if shares is None else {"shares": shares}  # on the CPU only
        steps = [int(each.steps) for each in variable_states]
        backends.of(states[0][0][0]).optimizers.take_step(
            f"{type(self).__name__}.apply_gradients",
            self._rule(states[0], steps),
            columns,
            states,
            op if shares is None else ReduceOp.SUM,
            is_checked=is_checked,
            **weighting,
        )
        for each in variable_states:
            each.steps[...] += 1
        self._iterations = max(self._iterations, max(steps) + 1)
