"""Writes of a variable: assignments, scatters, and the synchronization of copies."""

from __future__ import annotations

from typing import Any

from dvkernels import pytree, reduce_op
from dvkernels.errors import ContextError, SynchronizationError
from dvkernels.replicas.collective_call import CollectiveCall, Same
from dvkernels.user_errors import brief
from dvkernels.variables.access import LONE_REPLICA, calling_replica
from dvkernels.variables.copies import Copies, commit_together
from dvkernels.variables.modes import VariableSynchronization
from dvkernels.variables.synchronization import SYNC_MODES

__all__ = ["sync"]


class VariableWrites:
    """Writes of a variable: each follows the variable's modes, and changes all copies or none."""

    __slots__ = ()
    _copies: Copies

    def assign(self, value: Any) -> None:
        """Replace the content by ``value``.

        Parameters
        ----------
        value : array of this shape and dtype, or Python number for a 0-d variable
            In replica context the replica's value, or a distributed value that has one. In
            cross-replica context a value for all copies, or, for ON_READ and NONE, a
            ``PerReplica``.

        Raises
        ------
        BufferMismatchError, NotABufferError
            ``value`` does not have this shape and dtype.
        SynchronizationError
            ON_WRITE with aggregation NONE in one of several replicas; a ``PerReplica`` for an
            ON_WRITE variable; ``assign_add`` or ``assign_sub`` of an ON_READ variable with SUM in
            cross-replica context.
        ContextError
            Another strategy's scope or run is current, another thread runs a step of this
            strategy, or the variable was created outside every scope and a replica writes it.
        CollectiveMismatchError
            ON_WRITE in replica context: another replica did not make the same write.

        Notes
        -----
        In replica context:

        * ON_WRITE: the values of all replicas are aggregated, and every copy gets the result.
        * ON_READ and NONE: the replica's own copy gets its value.

        In cross-replica context every copy gets the value, except under ON_READ with SUM, where
        each copy gets a share and the shares add up to the value.

        After an error no copy has changed.

        Examples
        --------
        >>> import dvkernels as dv
        >>> rate = dv.Variable(0.1)
        >>> rate.assign(0.05)
        >>> float(rate)
        0.05
        """
        self._write("assign", value)

    def assign_add(self, value: Any) -> None:
        """Add ``value``. Parameters, errors and modes as for :meth:`assign`."""
        self._write("assign_add", value)

    def assign_sub(self, value: Any) -> None:
        """Subtract ``value``. Parameters, errors and modes as for :meth:`assign`."""
        self._write("assign_sub", value)

    def scatter_update(self, indices: Any, updates: Any) -> None:
        """Replace the rows ``indices`` by ``updates``; the last of several for one row wins.

        Parameters
        ----------
        indices : array-like of int, of any shape
            Positions along axis 0; repetitions are allowed. Negative indices raise.
        updates : array of shape ``indices.shape + variable.shape[1:]``, or a number
            Of this variable's dtype.

        Raises
        ------
        IndexError
            An index is out of range.
        SynchronizationError
            The variable is ON_READ; it is ON_WRITE with aggregation NONE and written in replica
            context; or ``scatter_update``, ``scatter_min`` or ``scatter_max`` under SUM or MEAN.
        BufferMismatchError, NotABufferError
            Shape or dtype of the updates do not fit; the indices are not integers; the variable is
            0-d.

        Notes
        -----
        In replica context, the copies of an ON_WRITE variable get the updates of all replicas
        (SUM), all of them divided by the number of replicas (MEAN), or those of replica 0
        (ONLY_FIRST_REPLICA); the replicas may pass different numbers of rows. A NONE variable
        changes in its own copy only. In cross-replica context all copies get the same updates.
        ``scatter_div`` of integers rounds down. After an error no copy has changed. The cost is
        proportional to the rows, not to the variable.

        Examples
        --------
        >>> import dvkernels as dv
        >>> table = dv.Variable([1.0, 2.0, 3.0])
        >>> table.scatter_add([0, 0, 2], [10.0, 10.0, 5.0])
        >>> table.numpy()
        array([21.,  2.,  8.])
        """
        self._scatter("scatter_update", indices, updates)

    def scatter_add(self, indices: Any, updates: Any) -> None:
        """Add ``updates`` to rows; several for one row accumulate. See :meth:`scatter_update`."""
        self._scatter("scatter_add", indices, updates)

    def scatter_sub(self, indices: Any, updates: Any) -> None:
        """Subtract ``updates`` from rows. See :meth:`scatter_update`."""
        self._scatter("scatter_sub", indices, updates)

    def scatter_mul(self, indices: Any, updates: Any) -> None:
        """Multiply rows by ``updates``, elementwise. See :meth:`scatter_update`."""
        self._scatter("scatter_mul", indices, updates)

    def scatter_div(self, indices: Any, updates: Any) -> None:
        """Divide rows by ``updates``, elementwise. See :meth:`scatter_update`."""
        self._scatter("scatter_div", indices, updates)

    def scatter_min(self, indices: Any, updates: Any) -> None:
        """Replace rows by the elementwise minimum with ``updates``. See :meth:`scatter_update`."""
        self._scatter("scatter_min", indices, updates)

    def scatter_max(self, indices: Any, updates: Any) -> None:
        """Replace rows by the elementwise maximum with ``updates``. See :meth:`scatter_update`."""
        self._scatter("scatter_max", indices, updates)

    def sync(self, op: reduce_op.Reduction | str = "mean") -> None:
        """Synchronize a NONE variable: every copy gets the reduction of all copies.

        Parameters, errors and contexts as for :func:`sync`, which synchronizes several variables in
        one collective.
        """
        sync([self], op)

    def _write(self, verb: str, value: Any) -> None:
        replica = calling_replica(self._copies, verb, write=True)
        mode = SYNC_MODES[self._copies.mode]
        if replica is None:
            mode.write_across(self._copies, verb, value)
        else:
            mode.write_in_replica(self._copies, verb, value, replica)

    def _scatter(self, verb: str, indices: Any, updates: Any) -> None:
        replica = calling_replica(self._copies, verb, write=True)
        mode = SYNC_MODES[self._copies.mode]
        if replica is None:
            mode.scatter_across(self._copies, verb, indices, updates)
        else:
            mode.scatter_in_replica(self._copies, verb, indices, updates, replica)


def sync(variables: Any, op: reduce_op.Reduction | str = "mean") -> None:
    """Synchronize NONE variables: every copy gets the reduction of all copies.

    Parameters
    ----------
    variables : Variable, or a pytree of them
        All of one strategy, with ``synchronization="none"``.
    op : ReduceOp, CustomReduction or str
        The reduction, or its name; it must support the dtype of each variable.

    Raises
    ------
    TypeError
        A leaf is not a variable.
    SynchronizationError
        A variable has another synchronization; it synchronizes by itself.
    ContextError
        The variables belong to several strategies, or another strategy is current.
    UnsupportedDTypeError
        ``op`` does not support the dtype of a variable.
    CollectiveMismatchError
        In replica context: the replicas did not all call it with the same variables.

    Notes
    -----
    In replica context this is one collective for all variables. After an error no variable has
    changed.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    ...     with strategy.scope():
    ...         weight = dv.Variable(0.0, synchronization="none")
    ...     weight.assign(dv.PerReplica([1.0, 3.0]))
    ...     dv.sync([weight])
    ...     print([float(copy) for copy in weight.values])
    [2.0, 2.0]
    """
    reduction = reduce_op.parse(op)
    listed = [_copies_to_sync(variable) for variable in pytree.leaves(variables)]
    for copies in listed:
        if copies.placement is not listed[0].placement:
            raise ContextError(
                f"sync: variable {copies.name!r} belongs to {copies.placement.name}, "
                f"{listed[0].name!r} to {listed[0].placement.name}; sync them apart"
            )
        dtype = copies.arrays[0].dtype
        reduce_op.check_dtype(f"sync of variable {copies.name!r}", reduction, dtype)
    if not listed:
        return
    replica = calling_replica(listed[0], "sync", write=True)

    def act(payloads: list[Any]) -> list[None]:
        writes = []
        for copies in listed:
            reduced = copies.placement.communicator.reduce(list(copies.arrays), reduction)
            writes.append((copies, [reduced] * len(copies.arrays)))
        commit_together(writes)
        return [None] * len(payloads)

    if replica is None or replica is LONE_REPLICA:
        act([])
        return
    if replica.trace is not None:
        for copies in listed:
            replica.trace.sync(copies, reduction)
        return
    terms = (reduction.value, *(t for c in listed for t in (c.name, Same(id(c)))))
    replica.meet(CollectiveCall("sync", terms, None, act))


def _copies_to_sync(variable: Any) -> Copies:
    if not isinstance(variable, VariableWrites):
        raise TypeError(f"sync needs variables; got {brief(variable)}")
    copies = variable._copies
    if copies.synchronization is not VariableSynchronization.NONE:
        raise SynchronizationError(
            f"sync of variable {copies.name!r}: it is {copies.synchronization.name}, which "
            f"synchronizes by itself; sync is for synchronization='none'"
        )
    return copies
