"""Base class of optimizers: reduce the replicas' gradients, and update all copies of variables."""

from __future__ import annotations

import abc
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dvkernels import context, verbs
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array
from dvkernels.kernels import backends, update_rules
from dvkernels.optimizers import gradients
from dvkernels.optimizers.optimizer_state import OptimizerState
from dvkernels.optimizers.row_gradient import RowGradient, take_row_step
from dvkernels.optimizers.slots import VariableState
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.replicas.collective_call import CollectiveCall, Same
from dvkernels.values import function_checks, replica_weights, scalar_checks
from dvkernels.variables.copies import rebind
from dvkernels.variables.table_server import PendingWrites, TableServer, apply_together
from dvkernels.variables.variable import Variable, copies_of, storage_of

__all__ = ["Optimizer"]

LearningRate = float | Callable[[int], float]
Columns = Sequence[Sequence[Array]]  # of each variable a gradient per replica, or its copies


class Optimizer(OptimizerState):
    """Base class of :class:`SGD`, :class:`Adagrad`, :class:`Adam` and :class:`AdamW`.

    Slots (velocities, moments) are variables with a copy on each device of their variable. They
    are created at a variable's first step, and deleted with it.

    Notes
    -----
    Each variable has its own step count, which is passed to a callable learning rate. So a variable
    that joins later, or is updated only sometimes, is updated as if it were the only one.

    ``copy.deepcopy`` copies slots and step counts. They belong to the copies of the variables that
    the same call copies, ``copy.deepcopy((model, optimizer))``, in any order; for variables that it
    does not copy, they belong to the variables themselves.

    Examples
    --------
    >>> import dvkernels as dv
    >>> isinstance(dv.optimizers.SGD(0.1), dv.optimizers.Optimizer)
    True
    """

    def __init__(self, learning_rate: LearningRate) -> None:
        if callable(learning_rate):
            function_checks.check("learning_rate", learning_rate)
        else:
            learning_rate = scalar_checks.within(learning_rate, "learning_rate", 0)
        self._learning_rate = learning_rate
        super().__init__()

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
            unchanged: it takes no step. For a variable of a parameter-server strategy a gradient
            may be a tuple ``(ids, slopes)``: only these rows and their slots change, and slopes of
            one row add up.
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
        After an error all variables, slots and step counts are as before. Where they lie on several
        servers, this holds for each server by itself: others may have taken the step.

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
        if replica.trace is not None:
            from dvkernels.optimizers import functional_step

            given = [(replica.own(gradient), variable) for gradient, variable in checked_pairs]
            functional_step.take_traced_step(
                self, replica.trace, given, reduction, replica.own(weight)
            )
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
        if storage_of(variables[0]).server is None:
            self._take_step(variables, columns, op, shares)
            return
        writes: PendingWrites = []
        is_here = isinstance(storage_of(variables[0]).server, TableServer)
        if is_here and len(variables) > 1 and callable(self._learning_rate):
            check_steps(functools.partial(self.step_at_server, each) for each in variables)
        for variable, (gradient,) in zip(variables, columns, strict=True):
            copies = storage_of(variable)
            step = functools.partial(self.step_at_server, variable)
            writes.append((copies.server, gradients.VERB, step, copies, gradient))
        apply_together(writes)

    def step_at_server(self, variable: Variable, _: Any, gradient: Any) -> None:
        """Take a step of one variable that has a server, which calls this."""
        if not self._slots.has(variable):  # the first steps of several variables at once
            _first_steps.ask(gradients.VERB, self._states_of, storage_of(variable), variable)
        if isinstance(gradient, RowGradient):
            self._take_row_step(variable, gradient)
        else:
            self._take_step([variable], [[gradient]], ReduceOp.MEAN, None)

    def check_step(self, variable: Variable, num_before: int) -> None:
        """Raise if a step of a variable would have no learning rate, so many steps after now."""
        if callable(self._learning_rate):
            has_steps = self._slots.has(variable)
            states = self._slots.states_of([variable], ()) if has_steps else []
            self._rates([num_before + sum(int(state.steps) for state in states)])

    def steps_at_server(self, variable: Variable, _: Any, steps: int | None) -> int:
        """Return the step count of a variable, which is set first if a number is given."""
        count = self._slots.states_of([variable], self.slot_names)[0].steps
        if steps is not None:
            count[...] = steps
        return int(count)

    def _states_of(self, _: Any, variable: Variable) -> None:
        self._slots.states_of([variable], self.slot_names)

    def _take_row_step(self, variable: Variable, gradient: RowGradient) -> None:
        """Take a step of the rows of a gradient; other rows and their slots stay as they are."""
        state = self._slots.states_of([variable], self.slot_names)[0]
        parameter, steps = copies_of(variable), int(state.steps)
        tables = [parameter[0], *(copies_of(state.slots[name])[0] for name in self.slot_names)]
        take_row_step(self._rule([parameter], [steps]), tables, gradient)
        state.steps[()] += 1
        self._iterations = max(self._iterations, steps + 1)

    def _take_step(
        self, variables: list[Variable], columns: Columns, op: Reduction, shares: list[float] | None
    ) -> None:
        """Take one step with the fused kernels."""
        names = self.slot_names
        variable_states = self._slots.states_of(variables, names)
        steps = [int(each.steps) for each in variable_states]
        if variables[0].owner.memory.is_immutable:
            self._take_functional_step(variables, columns, op, steps)
            self.count_steps(variable_states, max(steps) + 1)
            return
        states = [[copies_of(variable) for variable in variables]]
        states += [[copies_of(each.slots[name]) for each in variable_states] for name in names]
        # A writable gradient shares no element with variables and slots: users get read-only views
        # of these. So nothing is left for the kernel to check.
        is_writable = variables[0].owner.memory.is_writable
        is_checked = all(is_writable(gradient) for column in columns for gradient in column)
        weighting = {} if shares is None else {"shares": shares}  # on the CPU only
        backends.of(states[0][0][0]).optimizers.take_step(
            f"{type(self).__name__}.apply_gradients",
            self._rule(states[0], steps),
            columns,
            states,
            op if shares is None else ReduceOp.SUM,
            is_checked=is_checked,
            **weighting,
        )
        self.count_steps(variable_states, max(steps) + 1)

    def _take_functional_step(
        self, variables: list[Variable], columns: Columns, op: Reduction, steps: list[int]
    ) -> None:
        """Take one step whose results are new arrays, to which variables and slots are rebound."""
        from dvkernels.optimizers import functional_step

        found = functional_step.slots_of(self, variables)
        states = functional_step.states_of(variables, found, self.slot_names)
        rule = self._rule(columns, steps)
        owner = variables[0].owner
        contents = functional_step.new_contents(owner, rule, columns, states, op)
        rebind([copies for each in states for copies in each], contents)

    def count_steps(self, states: Sequence[VariableState], most: int) -> None:
        """Count a step of each of these variables; ``most`` is the largest count afterwards."""
        for each in states:
            each.steps[()] += 1
        self._iterations = max(self._iterations, most)


def check_steps(requests: Iterable[Any]) -> None:
    """Raise, before the first request of several is carried out, what a step among them would.

    Other requests were checked when they were made.
    """
    num_steps: Counter[tuple[int, int]] = Counter()
    for request in requests:
        step: Any = getattr(request, "func", None)  # a partial
        if getattr(step, "__func__", None) is Optimizer.step_at_server:
            (variable,) = request.args
            key = id(step.__self__), id(variable)
            step.__self__.check_step(variable, num_steps[key])
            num_steps[key] += 1


_first_steps = TableServer(())  # the slots of one variable after another are made
