"""Update of a variable: a function applied to each copy, and all copies written together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dvkernels import context, pytree
from dvkernels.context import Frame
from dvkernels.errors import ContextError, SynchronizationError
from dvkernels.profiler import debugging
from dvkernels.values import function_checks, operands, regroup
from dvkernels.values.distributed import Mirrored, PerReplica
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound
from dvkernels.variables import drift
from dvkernels.variables.copies import Copies
from dvkernels.variables.drafts import commit_drafts, drafts_of, end_drafts
from dvkernels.variables.modes import VariableSynchronization
from dvkernels.variables.table_server import pending_writes
from dvkernels.variables.variable import Variable, copies_of, storage_of

__all__: list[str] = []


class VariableUpdate(ProcessBound):
    """Base class of strategies: their method ``update``."""

    _placement: Placement

    def update(
        self,
        variable: Variable,
        fn: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        group: bool = True,
    ) -> Any:
        """Call ``fn(copy, *args, **kwargs)`` on every copy of a variable, in turn.

        Parameters
        ----------
        variable : Variable
            A variable of this strategy.
        fn : callable
            Receives each copy as a variable of one device, with the same methods. It runs in
            cross-replica context, and must do the same to every copy of an ON_WRITE variable.
        args : list or tuple
            Positional arguments after the copy.
        kwargs : dict, optional
            Keyword arguments. Distributed values in ``args`` and ``kwargs`` are replaced by the
            component of the copy.
        group : bool
            True to return a ``Mirrored`` of the results, False for a tuple.

        Returns
        -------
        Mirrored, a pytree of them, or tuple
            The results of ``fn``, one per copy; None if ``fn`` returned None for every copy.

        Raises
        ------
        SynchronizationError
            A ``PerReplica`` among the arguments of an ON_WRITE variable, whose copies are equal.
        ContextError
            Called in replica context or while another thread runs a step of this strategy, or the
            variable belongs to another strategy, or its rows lie in server processes: a function
            cannot hold them while it computes.
        TypeError, ValueError
            Not a variable; a coroutine or generator function; malformed ``args`` or ``kwargs``.

        Notes
        -----
        All copies change together, after ``fn`` has returned for each of them: if it raises, all
        copies are as before. A copy that is written needs one more array until then.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     with strategy.scope():
        ...         weight = dv.Variable(1.0)
        ...     strategy.update(weight, lambda copy, x: copy.assign_add(x), args=(2.0,))
        ...     print(weight.numpy())
        3.0
        """
        here = context.require_cross_replica(self._placement, "update")
        function_checks.check("update", fn)
        if not isinstance(variable, Variable):
            raise TypeError(f"update: expected a variable, got a {type(variable).__name__}")
        if variable.owner is not self._placement:
            raise ContextError(
                f"update: variable {variable.name!r} belongs to {variable.owner.name}, not to "
                f"{self._placement.name}"
            )
        context.check_no_step_elsewhere(self._placement, f"update of variable {variable.name!r}")
        function_checks.check_arguments("update", args, kwargs)
        given = (tuple(args), dict(kwargs or {}))
        equal = variable.synchronization is VariableSynchronization.ON_WRITE
        if equal and any(isinstance(leaf, PerReplica) for leaf in pytree.leaves(given)):
            raise SynchronizationError(
                f"update of variable {variable.name!r}: its copies are equal, and a PerReplica "
                f"among the arguments would let them drift apart; reduce it first"
            )
        frame = Frame(self._placement, self, merging=here is not None and here.merging)

        def change(copies: Copies) -> list[Any]:
            drafts = drafts_of(variable)
            dealt = operands.components(given, "update", self._placement, num_copies=len(drafts))
            token = context.enter(frame)
            try:
                results = [
                    fn(draft, *positional, **named)
                    for draft, (positional, named) in zip(drafts, dealt, strict=True)
                ]
                if debugging.active is not None and equal:
                    contents = [copies_of(draft)[0] for draft in drafts]
                    drift.compare(f"update of variable {copies.name!r}", contents)
                commit_drafts(variable, drafts)
            finally:
                end_drafts(drafts)
                context.leave(token)
            return results

        copies = storage_of(variable)
        if copies.server is None:
            results = change(copies)
        elif pending_writes.get() is None:
            results = copies.server.ask("update", change, copies)
        else:
            raise ContextError(
                f"update of variable {variable.name!r} in a call with once=True, whose writes take "
                f"effect when it has returned; use the variable's own methods there"
            )
        if not group:
            return tuple(results)
        return regroup.regroup(results, variable.devices, self._placement, Mirrored)
