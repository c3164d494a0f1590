"""Replica context: the identity of one replica, and its collectives, inside ``strategy.run``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dvkernels import context, pytree, verbs
from dvkernels.context import Replica
from dvkernels.reduce_op import Reduction
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.foreign_threads import UnscopedRendezvous
from dvkernels.values import function_checks, regroup
from dvkernels.values.handle import Handle

__all__ = ["ReplicaContext", "get_replica_context"]


class ReplicaContext(Replica):
    """Identity and collectives of one replica, inside ``strategy.run``.

    Notes
    -----
    Every replica must call the same collectives in the same order. A collective takes a pytree of
    arrays and numbers, in which a distributed value stands for this replica's component, leaves
    it unchanged, and returns arrays that the caller owns. If the replicas disagree, the step ends
    with ``CollectiveMismatchError`` in all of them. After the step every collective of its
    contexts raises ``ContextError``.

    Examples
    --------
    >>> import dvkernels as dv
    >>> def step(x):
    ...     replica = dv.get_replica_context()
    ...     return replica.all_reduce("mean", x + replica.replica_id_in_sync_group)
    >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    ...     print(strategy.run(step, args=(1.0,))[0])
    1.5
    """

    __slots__ = ()
    _bound_by = (
        "it belongs to one replica in one step; call dv.get_replica_context() where it is "
        "needed, and pass on numbers such as replica_id_in_sync_group"
    )

    def all_reduce(
        self,
        op: Reduction | str,
        value: Any,
        *,
        weight: float | None = None,
        out: Any = None,
        shared: bool = False,
    ) -> Any:
        """Reduce ``value`` over the replicas; every replica gets the result.

        Parameters
        ----------
        op : ReduceOp, CustomReduction or str
            SUM, MEAN, MIN, MAX or PROD, or a custom reduction.
        value : pytree of array or number
            Arrays of any shape and of a dtype that ``op`` supports; structure, shapes and dtypes
            must be the same on every replica. Unchanged, unless it is also ``out``.
        weight : float, optional
            With MEAN only: the result is sum(weight * value) / sum(weight), so that uneven batches
            give the mean of all examples. A replica of weight 0 does not contribute, even where
            its value is NaN.
        out : pytree of array, optional
            Receives the result: writable arrays of the structure, shapes and dtypes of ``value``.
            May be ``value`` itself, for a reduction in place.
        shared : bool
            True to return one read-only result for all replicas of this process. R local replicas
            then move R + 1 arrays through memory instead of 2 R. Must be the same on every
            replica; excludes ``out``.

        Returns
        -------
        pytree of array
            New arrays that the caller owns, or ``out``, or the shared read-only arrays.

        Raises
        ------
        UnsupportedDTypeError, ReduceOpError, NotABufferError, BufferMismatchError, ValueError
            Bad input, found before this replica takes part; the step ends on all replicas.
        CollectiveMismatchError
            The replicas disagree about the call. ``out`` is unchanged.

        Notes
        -----
        Every replica gets the same bits. 0-d inputs give 0-d arrays.

        Examples
        --------
        >>> import dvkernels as dv
        >>> def step(loss, examples):
        ...     return dv.get_replica_context().all_reduce("mean", loss, weight=examples)
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     losses, examples = dv.PerReplica([1.0, 5.0]), dv.PerReplica([3, 1])
        ...     print(strategy.run(step, args=(losses, examples))[0])
        2.0
        """
        return verbs.all_reduce(self, op, value, weight, out, shared)

    def all_reduce_async(self, op: Reduction | str, value: Any) -> Handle:
        """Start an :meth:`all_reduce` that a progress thread carries out in the background.

        Parameters
        ----------
        op : ReduceOp, CustomReduction or str
            As for :meth:`all_reduce`.
        value : pytree of array or number
            As for :meth:`all_reduce`. Must not be written until ``wait`` has returned.

        Returns
        -------
        Handle
            Its ``wait()`` returns the reduction: new arrays that the caller owns.

        Raises
        ------
        UnsupportedDTypeError, ReduceOpError, NotABufferError
            Bad input.
        CollectiveMismatchError
            The replicas issued different calls; raised by ``wait()``.

        Notes
        -----
        The k-th asynchronous call of a replica is matched with the k-th of the others, whichever
        other collectives lie between. The progress thread of the strategy carries out one call
        after another, each as soon as all replicas have issued it; ``run`` returns when all are
        done. Calling ``wait()`` is optional.

        Examples
        --------
        >>> import dvkernels as dv
        >>> import numpy as np
        >>> def step(gradients):
        ...     replica = dv.get_replica_context()
        ...     handles = [replica.all_reduce_async("mean", g) for g in gradients]
        ...     # ... other work ...
        ...     return [handle.wait() for handle in handles]
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.run(step, ([np.ones(2), np.zeros(3)],))[1])
        PerReplica(0: array([0., 0., 0.]), 1: array([0., 0., 0.]))
        """
        return verbs.all_reduce_async(self, op, value)

    def reduce_scatter(self, op: Reduction | str, value: Any) -> Any:
        """Reduce ``value`` over the replicas; replica r gets part r of the result.

        Parameters
        ----------
        op : ReduceOp, CustomReduction or str
            As for :meth:`all_reduce`.
        value : pytree of array
            As for :meth:`all_reduce`, with at least one axis. Unchanged.

        Returns
        -------
        pytree of array
            New arrays that the caller owns: part r as by ``numpy.array_split`` along axis 0, so
            sizes differ by at most one, larger parts first.

        Raises
        ------
        BufferMismatchError
            An array is 0-d. Further errors are those of :meth:`all_reduce`.

        Examples
        --------
        >>> import dvkernels as dv
        >>> import numpy as np
        >>> def step():
        ...     return dv.get_replica_context().reduce_scatter("sum", np.arange(3))
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.run(step))
        PerReplica(0: array([0, 2]), 1: array([4]))
        """
        return verbs.reduce_scatter(self, op, value)

    def all_gather(self, value: Any, axis: int = 0) -> Any:
        """Concatenate the replicas' values in replica order; every replica gets the whole.

        Parameters
        ----------
        value : pytree of array or number
            Of one structure, with arrays of one dtype and one shape except for the lengths along
            ``axis``. Scalars are stacked. Strings of fixed width get the widest width. Unchanged.
        axis : int
            The axis of concatenation; a negative axis counts from the end.

        Returns
        -------
        pytree of array
            New arrays that the caller owns.

        Raises
        ------
        ValueError
            ``axis`` is out of range on this replica.
        CollectiveMismatchError
            Structures, dtypes, other lengths or axes differ between the replicas.

        Examples
        --------
        >>> import dvkernels as dv
        >>> import numpy as np
        >>> def step():
        ...     replica = dv.get_replica_context()
        ...     return replica.all_gather(np.arange(1 + replica.replica_id_in_sync_group))
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.run(step)[0])
        [0 0 1]
        """
        return verbs.all_gather(self, value, axis)

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """Send the value of replica ``root`` to every replica.

        Parameters
        ----------
        value : pytree of array or number
            Of the same structure, shapes and dtypes on every replica; only the root's content is
            read. Unchanged.
        root : int
            The replica whose value is sent.

        Returns
        -------
        pytree of array
            New arrays that the caller owns.

        Raises
        ------
        ValueError
            ``root`` is not a replica id.
        CollectiveMismatchError
            Structures, shapes, dtypes or roots differ between the replicas.

        Examples
        --------
        >>> import dvkernels as dv
        >>> def step():
        ...     replica = dv.get_replica_context()
        ...     return int(replica.broadcast(replica.replica_id_in_sync_group, root=1))
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.run(step))
        PerReplica(0: 1, 1: 1)
        """
        return verbs.broadcast(self, value, root)

    def barrier(self) -> None:
        """Block until every replica of every worker has called this method."""
        verbs.barrier(self)

    def merge_call(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``fn(strategy, *args, **kwargs)`` once, in cross-replica context.

        Parameters
        ----------
        fn : callable
            The same function on every replica. The function of the first replica is called, while
            all replicas wait. Over several workers it runs once on each, for the replicas there.
        args : list or tuple
            Positional arguments, of the same structure on every replica.
        kwargs : dict, optional
            Keyword arguments. Each leaf of ``args`` and ``kwargs`` becomes a ``PerReplica`` of the
            values that the replicas passed; a variable that all of them passed stays that
            variable.

        Returns
        -------
        object
            The result of ``fn``, with each ``PerReplica`` in it replaced by this replica's
            component.

        Raises
        ------
        CollectiveMismatchError
            The replicas passed different structures.
        TypeError, ValueError
            A coroutine or generator function; malformed ``args`` or ``kwargs``.

        Examples
        --------
        >>> import dvkernels as dv
        >>> def step(x):
        ...     replica = dv.get_replica_context()
        ...     return float(replica.merge_call(lambda s, x: s.reduce("sum", x), args=(x,)))
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.run(step, args=(dv.PerReplica([1.0, 2.0]),)))
        PerReplica(0: 3.0, 1: 3.0)
        """
        function_checks.check("merge_call", fn)
        function_checks.check_arguments("merge_call", args, kwargs)
        given = (tuple(args), dict(kwargs or {}))
        terms = (pytree.flatten(given)[1],)
        return self.meet(CollectiveCall("merge_call", terms, (fn, given), self._merge))

    def _merge(self, payloads: list[Any]) -> list[Any]:
        """Run the first replica's function on the arguments of all, in cross-replica context."""
        placement = self.placement
        joined_args, joined_kwargs = regroup.regroup(
            [given for _, given in payloads], placement.replica_devices, placement
        )
        fn = payloads[0][0]
        token = context.enter(context.Frame(placement, self.strategy, merging=True))
        try:
            result = fn(self.strategy, *joined_args, **joined_kwargs)
        finally:
            context.leave(token)
        return [
            regroup.per_replica_component(result, rank, placement) for rank in range(len(payloads))
        ]


def get_replica_context() -> ReplicaContext | None:
    """Return the context of the replica that calls.

    Returns
    -------
    ReplicaContext or None
        None in cross-replica context. Outside every scope the context of a single replica with
        id 0.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.get_replica_context().num_replicas_in_sync
    1
    """
    frame = context.find()
    if frame is None:
        return ReplicaContext(context.UNSCOPED, UnscopedRendezvous(), 0, None)
    replica: ReplicaContext | None = frame.replica
    return replica
