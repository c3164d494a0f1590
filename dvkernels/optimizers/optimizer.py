"""What every optimizer does: bring the replicas' gradients together, and update all copies."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Self

from dvkernels import context, user_errors
from dvkernels.communicators.bucketing import all_reduce_each
from dvkernels.devices import array_memory
from dvkernels.errors import CollectiveMismatchError, ContextError
from dvkernels.kernels import backends
from dvkernels.optimizers import gradients, saved_state
from dvkernels.optimizers.slots import Kept, Slots
from dvkernels.reduce_op import ReduceOp
from dvkernels.replicas.rendezvous import CollectiveCall, Same
from dvkernels.user_errors import shown
from dvkernels.values import function_checks, replica_weights, scalar_checks
from dvkernels.variables.variable import Variable, copies_of

__all__ = ["Optimizer"]

LearningRate = float | Callable[[int], float]


class Optimizer(abc.ABC):
    """Updates variables from gradients; :class:`SGD`, :class:`Adam` and :class:`AdamW` are such.

    Its slots (velocities, moments) are variables that live like the ones they belong to: as many
    copies, on the same devices. They are made at a variable's first step, and go with it.

    Notes
    -----
    Each variable has its own count of steps, which is what a callable learning rate is given: one
    that comes later, or only sometimes, is stepped as one of that age.

    ``copy.deepcopy`` of an optimizer has slots and counts of its own. They are those of the copies
    of variables that are copied by the same call, ``copy.deepcopy((model, optimizer))``, in
    whatever order; of variables that are not, they are for the variables themselves.
    """

    def __init__(self, learning_rate: LearningRate) -> None:
        if callable(learning_rate):
            function_checks.check("learning_rate", learning_rate)
        else:
            learning_rate = checked(learning_rate, "learning_rate", 0)
        self._learning_rate = learning_rate
        self._iterations = 0
        self._slots = Slots()

    @property
    def iterations(self) -> int:
        """The most steps that a variable has taken."""
        return self._iterations

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step of a variable that has taken :attr:`iterations`."""
        return self._rate(self._iterations)

    def _rate(self, steps: int) -> float:
        rate = self._learning_rate
        return checked(rate(steps), "learning_rate", 0) if callable(rate) else rate

    def _rates(self, steps: Sequence[int]) -> list[float]:
        """Return the learning rate of each variable; a callable is asked once for each count."""
        if not callable(self._learning_rate):
            return [self._learning_rate] * len(steps)
        of_count = {count: self._rate(count) for count in dict.fromkeys(steps)}
        return [of_count[count] for count in steps]

    def slots(self, variable: Variable) -> tuple[Variable, ...]:
        """Return the slots of a variable, in the order of :attr:`slot_names`; zeros at first."""
        names = self.slot_names
        kept = self._kept("slots", variable)
        return tuple(kept.slots[name] for name in names)

    def steps(self, variable: Variable) -> Any:
        """Return how many steps a variable has taken: an int64 array of shape ()."""
        return self._kept("steps", variable).steps

    def _kept(self, verb: str, variable: Variable) -> Kept:
        if not isinstance(variable, Variable):
            raise TypeError(f"{verb} belong to variables; got {shown(variable)}")
        if not self._slots.has(variable):
            self._check_across(f"{verb} of variable {variable.name!r}, which has none yet")
        return self._slots.of_each([variable], self.slot_names)[0]

    def _check_across(self, verb: str) -> None:
        """Raise in a replica: each would make its own."""
        frame = context.find()
        if frame is not None and frame.replica is not None:
            raise ContextError(
                f"{verb}, in replica {frame.replica.replica_id_in_sync_group}: each replica would "
                f"make its own; call it outside of run or in merge_call"
            )

    @property
    def slotted(self) -> tuple[Variable, ...]:
        """The variables that have taken steps, in the order in which they came."""
        return tuple(variable for variable, _ in self._slots.living())

    def __copy__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} has no shallow copy: both would step the same slots; take "
            f"copy.deepcopy, of the variables too if the copy is to step copies of them"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = object.__new__(type(self))
        memo[id(self)] = made
        vars(made).update((name, copy.deepcopy(one, memo)) for name, one in vars(self).items())
        return made

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: its slots live with their variables; save "
            f"state_dict(), or all of the run with dv.Checkpoint"
        )

    # -- states ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return steps and slots, as plain data and arrays: see :meth:`load_state_dict`.

        ``"variables"`` lists, for each variable that has taken steps, in the order in which they
        came, its ``"name"``, ``"shape"``, ``"dtype"`` and ``"steps"``, and its ``"slots"``, an
        array for each name. Learning rate, momentum and the like are the program's, and not part
        of it.
        """
        entries = [
            saved_state.entry(variable, int(kept.steps), kept.slots, self.slot_names)
            for variable, kept in self._slots.living()
        ]
        return {
            "iterations": self._iterations,
            "slot_names": list(self.slot_names),
            "variables": [*entries, *copy.deepcopy(self._slots.pending)],
        }

    def load_state_dict(self, state: Any, variables: Sequence[Variable] | None = None) -> None:
        """Take over what :meth:`state_dict` returned.

        Parameters
        ----------
        state : dict
        variables : sequence of Variable, optional
            Whose they are: as many as the state holds, in its order. If not given, they are found
            by name among those that have taken steps here, and, of the others, when they come; a
            state of the very same list of variables needs no unique names.

        Raises
        ------
        ValueError
            It is not such a state, that of an optimizer with other slots, or does not fit the
            variables. Nothing has changed.
        ContextError
            Called in a replica.

        Notes
        -----
        A variable that comes later and is not in the state begins with zeros, unless the state
        still holds one of its shape and dtype under another name: then ``apply_gradients`` raises
        ``ValueError``, since it might be that one.
        """
        self._check_across("load_state_dict")
        iterations = saved_state.checked_progress(state, self.slot_names)
        entries = saved_state.checked_entries(state.get("variables"), self.slot_names)
        known = self.slotted if variables is None else tuple(variables)
        chosen, pending = saved_state.matched(entries, known, is_ordered=variables is not None)
        self._slots = Slots.of(chosen, pending, self.slot_names)
        self._iterations = iterations

    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the slots and steps of variables."""
        pending = copy.deepcopy(self._slots.pending)
        held = {"iterations": self._iterations, "slot_names": list(self.slot_names)}
        return {**held, "pending": pending} if pending else held

    def set_progress(self, state: Any) -> None:
        """Take over what :meth:`progress` returned; raise ValueError for anything else."""
        iterations = saved_state.checked_progress(state, self.slot_names)
        self._slots.pending = saved_state.checked_entries(state.get("pending", []), self.slot_names)
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
        steps: Sequence[int],
        reduction: Mapping[str, Any],
    ) -> None:
        """Take the step: ``states[0]`` holds the variables' copies, then come the slots'.

        ``steps`` are those that each variable has taken before, ``reduction`` the arguments that
        say how the gradients of the replicas become one.
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
            In a replica its own gradients, and all replicas call this with the same variables.
            In cross-replica context each gradient is a ``PerReplica``, or one array for all. The
            variables are float32 or float64 and ON_WRITE; gradients have their shape and dtype.
            A gradient of None, on all replicas, leaves its variable out: it takes no step.
        op : ReduceOp or str
            How the replicas' gradients become one: ``"mean"`` or ``"sum"``.
        weight : float, optional
            How much this replica's gradients count in the mean, as for ``all_reduce``: the number
            of its rows, where batches are uneven. In cross-replica context a ``PerReplica``.

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
            The replicas brought different variables, or None on some of them only.
        ValueError
            A weight that is no finite number of at least 0, all weights 0, or one with ``"sum"``.

        Notes
        -----
        After an error all variables, slots and counts of steps are as before.

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
        listed = gradients.listed(pairs)
        frame = context.find()
        replica = None if frame is None else frame.replica
        if replica is None:
            self._across(listed, reduction, weight)
            return
        if weight is not None:
            weight = replica_weights.checked(replica.own(weight), gradients.VERB, reduction)
        own = [(replica.own(gradient), variable) for gradient, variable in listed]
        present = [pair for pair in own if pair[0] is not None]
        variables = gradients.variables_of(present, reduction)
        name, counts = replica.replica_id_in_sync_group, weight != 0
        brought = [gradients.checked(*pair, name, counts=counts) for pair in present]
        absent = [variable.name for gradient, variable in own if gradient is None]

        def act(payloads: list[Any]) -> list[None]:
            columns = [list(column) for column in zip(*(p[0] for p in payloads), strict=True)]
            given = None if weight is None else [payload[1] for payload in payloads]
            self._reduce(variables, columns, reduction, given, absent)
            return [None] * len(payloads)

        named = (
            term
            for gradient, variable in own
            for term in (
                f"{variable.name} without a gradient" if gradient is None else variable.name,
                Same(id(variable)),
            )
        )
        weighted = None if weight is None else "weighted"
        terms = (Same(id(self)), reduction.value, weighted, *named)
        replica.meet(CollectiveCall(gradients.VERB, terms, (brought, weight), act))

    def _across(self, listed: list[tuple[Any, Variable]], op: ReduceOp, weight: Any) -> None:
        """Take a step in cross-replica context, or outside every scope."""
        present = [(one, v) for one, v in listed if not gradients.is_absent(one, v)]
        variables = gradients.variables_of(present, op)
        each = gradients.weights_of(weight, variables, op)
        columns, is_one_for_all = gradients.columns_of(present, each)
        if not is_one_for_all:
            absent = [v.name for _, v in listed if all(v is not other for other in variables)]
            self._reduce(variables, columns, op, each, absent)
            return
        if each is not None:  # of equal gradients it is the mean, but that there must be one
            replica_weights.normalized_shares(each, variables[0].owner.workers, gradients.VERB)
        self._step(variables, columns, op, None)

    def _reduce(
        self,
        variables: list[Variable],
        columns: list[list[Any]],
        op: ReduceOp,
        each: list[float] | None,
        absent: list[str],
    ) -> None:
        """Take a step with what the replicas of all workers brought; ``each`` is their weights.

        The fused kernels reduce the gradients of one process in the pass that updates the
        variables.
        """
        if not variables:
            return
        owner = variables[0].owner
        shares = None
        if each is not None:
            shares = replica_weights.normalized_shares(each, owner.workers, gradients.VERB)
        is_alone = owner.workers.size == 1
        if shares is not None and not (is_alone and owner.memory is array_memory.HOST):
            columns, op, shares = replica_weights.scaled_shares(columns, shares), ReduceOp.SUM, None
        if not is_alone:
            try:
                reduced = all_reduce_each(owner.communicator, columns, op)
            except CollectiveMismatchError as error:
                where = f"{gradients.VERB} on worker {owner.workers.rank}"
                user_errors.annotate(error, f"{where}: without a gradient are {absent or 'none'}")
                raise
            columns = [copies[:1] for copies in reduced]
        self._step(variables, columns, op, shares)

    def _step(
        self,
        variables: list[Variable],
        columns: list[list[Any]],
        op: ReduceOp,
        shares: list[float] | None,
    ) -> None:
        """Take one step; ``columns[k]`` holds the replicas' gradients of variable k."""
        if not variables:
            return
        names = self.slot_names
        kept = self._slots.of_each(variables, names)
        states = [[copies_of(variable) for variable in variables]]
        states += [[copies_of(one.slots[name]) for one in kept] for name in names]
        reduction = {"op": op} if shares is None else {"op": ReduceOp.SUM, "shares": shares}
        taken = [int(one.steps) for one in kept]
        self._update(backends.of(states[0][0][0]).optimizers, columns, states, taken, reduction)
        for one in kept:
            one.steps[...] += 1
        self._iterations = max(self._iterations, max(taken) + 1)


def checked(number: Any, name: str, least: float, below: float = float("inf")) -> float:
    """Return a setting as a float in ``[least, below)``, else raise ValueError."""
    value = scalar_checks.real(number)
    if not least <= value < below:
        limits = f"at least {least:g}" + (f" and below {below:g}" if below < float("inf") else "")
        raise ValueError(f"{name} must be a finite number, {limits}; got {shown(number, 60)}")
    return value
