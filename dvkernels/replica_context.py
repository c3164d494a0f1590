"""Replica context: the identity of one replica, and its collectives, inside ``strategy.run``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dvkernels import context, pytree, reduce_op
from dvkernels.communicators.bucketing import all_reduce_each
from dvkernels.devices import array_memory, interop
from dvkernels.devices.array_spec import refuse_masked, spec
from dvkernels.devices.device import Device
from dvkernels.errors import BufferMismatchError, NotABufferError
from dvkernels.profiler import debugging
from dvkernels.pytree import describe_structure
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.foreign_threads import UnscopedRendezvous
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.values import function_checks, regroup, replica_weights
from dvkernels.values.array_leaves import ArrayLeaves, arrays_of, prepare_gather, with_common_dtype
from dvkernels.values.distributed import PerReplica, is_integer
from dvkernels.values.handle import Handle
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound

__all__ = ["ReplicaContext", "get_replica_context"]


class ReplicaContext(ProcessBound):
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

    __slots__ = ("__weakref__", "_placement", "_rank", "_replica_id", "_step", "_strategy")
    _bound_by = (
        "it belongs to one replica in one step; call dv.get_replica_context() where it is "
        "needed, and pass on numbers such as replica_id_in_sync_group"
    )

    def __init__(self, placement: Placement, step: Rendezvous, rank: int, strategy: Any) -> None:
        self._placement = placement
        self._step = step
        self._rank = rank
        self._replica_id = placement.first_replica + rank
        self._strategy = strategy

    @property
    def replica_id_in_sync_group(self) -> int:
        """The id of this replica, from 0, over all workers."""
        return self._replica_id

    @property
    def rank_in_process(self) -> int:
        """The rank of this replica among those of its process."""
        return self._rank

    @property
    def num_replicas_in_sync(self) -> int:
        """The number of replicas that take part in collectives, over all workers."""
        return self._placement.num_replicas

    @property
    def device(self) -> Device:
        """The device of this replica."""
        return self._placement.replica_devices[self._rank]

    @property
    def strategy(self) -> Any:
        """The strategy that runs this replica."""
        return context.default_strategy() if self._strategy is None else self._strategy

    def __repr__(self) -> str:
        return (
            f"<replica {self._replica_id} of {self.num_replicas_in_sync} on {self.device}, "
            f"{self._placement.name}>"
        )

    # -- collectives ----------------------------------------------------------------------------

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
        if weight is not None:
            weight = replica_weights.checked(self.own(weight), "all_reduce", reduce_op.parse(op))
        leaves, reduction = self._reducible("all_reduce", op, value, counts=weight != 0)
        targets = self._targets(out, leaves) if out is not None else None
        if shared and out is not None:
            raise ValueError("all_reduce: out belongs to one replica, so it cannot be shared")
        communicator, dtypes = self._placement.communicator, [a.dtype for a in leaves.arrays]
        workers = self._placement.workers

        def act(payloads: list[Any]) -> list[list[Any]]:
            columns: list[Any] = list(zip(*(payload[0] for payload in payloads), strict=True))
            kernel_op: Reduction = reduction
            if weight is not None:
                weights = [payload[2] for payload in payloads]
                shares = replica_weights.normalized_shares(weights, workers, "all_reduce")
                if shares is not None:
                    columns = replica_weights.scaled_shares(columns, shares)
                    kernel_op = ReduceOp.SUM
            outs = None
            if targets is not None:
                outs = list(zip(*(payload[1] for payload in payloads), strict=True))
            if not shared and all(
                column[0].dtype == dtype for column, dtype in zip(columns, dtypes, strict=True)
            ):
                reduced = all_reduce_each(communicator, columns, kernel_op, outs)
                return _per_replica_rows(reduced, len(payloads))
            results: list[Sequence[Any]] = []
            for k, column in enumerate(columns):
                into = None if outs is None else outs[k]
                if shared:
                    total = communicator.reduce(column, kernel_op)
                    total = total.astype(dtypes[k], copy=False)
                    total = array_memory.holding(total).read_only(total)
                    results.append([total] * len(payloads))
                elif column[0].dtype == dtypes[k]:
                    results.append(communicator.all_reduce(column, kernel_op, into))
                else:  # weighted float16 or bfloat16, scaled in float32
                    mean = communicator.reduce(column, kernel_op).astype(dtypes[k])
                    results.append(_copy_for_each(mean, into, column))
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
        result = self._step.meet(self._rank, CollectiveCall("all_reduce", terms, payload, act))
        if out is None:
            return leaves.restored(result)
        if targets is not None and leaves.originals is not None:
            leaves.restored(targets)  # the streams of their libraries wait for the results
        return out

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
        leaves, reduction = self._reducible("all_reduce_async", op, value)
        communicator = self._placement.async_communicator

        def act(payloads: list[Any]) -> list[list[Any]]:
            columns = zip(*payloads, strict=True)
            reduced = all_reduce_each(communicator, columns, reduction)
            return _per_replica_rows(reduced, len(payloads))

        terms = (reduction.value, leaves.structure, leaves.specs)
        step, rank = self._step, self._rank
        pending = step.issue(rank, CollectiveCall("all_reduce_async", terms, leaves.arrays, act))
        return Handle(
            lambda: pending.done.is_open, lambda: leaves.restored(step.await_pending(rank, pending))
        )

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
        leaves, reduction = self._reducible("reduce_scatter", op, value)
        for array in leaves.arrays:
            if array.ndim == 0:
                raise BufferMismatchError(
                    f"reduce_scatter splits along axis 0, and replica {self._replica_id} passed a "
                    f"0-d array; use all_reduce"
                )
        communicator = self._placement.communicator

        def act(payloads: list[Any]) -> list[list[Any]]:
            columns = [
                communicator.reduce_scatter(column, reduction)
                for column in zip(*payloads, strict=True)
            ]
            return _per_replica_rows(columns, len(payloads))

        return self._collect("reduce_scatter", (reduction.value,), leaves, act)

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
        leaves = self._arrays("all_gather", value)
        arrays, axes, specs = prepare_gather("all_gather", leaves.arrays, axis, self._replica_id)
        leaves = leaves._replace(arrays=arrays, specs=specs)
        communicator, workers = self._placement.communicator, self._placement.workers

        def act(payloads: list[Any]) -> list[list[Any]]:
            columns = [
                communicator.all_gather(with_common_dtype(column, workers), column_axis)
                for column, column_axis in zip(zip(*payloads, strict=True), axes, strict=True)
            ]
            return _per_replica_rows(columns, len(payloads))

        return self._collect("all_gather", (axis,), leaves, act)

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
        if not is_integer(root) or not 0 <= root < self.num_replicas_in_sync:
            raise ValueError(
                f"broadcast: root must be a replica id from 0 to {self.num_replicas_in_sync - 1}, "
                f"got {root!r} on replica {self._replica_id}"
            )
        leaves = self._arrays("broadcast", value)
        communicator = self._placement.communicator

        def act(payloads: list[Any]) -> list[list[Any]]:
            columns = [
                communicator.broadcast(column, int(root)) for column in zip(*payloads, strict=True)
            ]
            return _per_replica_rows(columns, len(payloads))

        return self._collect("broadcast", (int(root),), leaves, act)

    def barrier(self) -> None:
        """Block until every replica of every worker has called this method."""
        workers = self._placement.workers

        def act(payloads: list[Any]) -> list[None]:
            workers.barrier()
            return [None] * len(payloads)

        self._step.meet(self._rank, CollectiveCall("barrier", (), None, act))

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
        if not isinstance(args, (list, tuple)):
            raise ValueError(f"merge_call: args must be a list or tuple, got {type(args).__name__}")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ValueError(f"merge_call: kwargs must be a dict, got {type(kwargs).__name__}")
        strategy, placement = self.strategy, self._placement
        named = dict(kwargs or {})

        def act(payloads: list[Any]) -> list[Any]:
            joined_args, joined_kwargs = regroup.regroup(
                [(tuple(payload[1]), payload[2]) for payload in payloads],
                placement.replica_devices,
                placement,
            )
            frame = context.Frame(placement, self._strategy, merging=True)
            token = context.enter(frame)
            try:
                result = payloads[0][0](strategy, *joined_args, **joined_kwargs)
            finally:
                context.leave(token)
            return [_components_of(result, rank, placement) for rank in range(len(payloads))]

        structure = pytree.flatten((tuple(args), named))[1]
        call = CollectiveCall("merge_call", (structure,), (fn, args, named), act)
        return self._step.meet(self._rank, call)

    def meet(self, call: CollectiveCall) -> Any:
        """Take part in a collective call of another module, such as a variable's write."""
        return self._step.meet(self._rank, call)

    def own(self, value: Any) -> Any:
        """Return this replica's component of a distributed value; a plain value as it is."""
        return regroup.own_component(value, self._rank, self._placement)

    # -- shared implementation ------------------------------------------------------------------

    def _collect(
        self,
        verb: str,
        terms: tuple[Any, ...],
        leaves: ArrayLeaves,
        act: Callable[[list[Any]], Sequence[Any]],
    ) -> Any:
        call = CollectiveCall(verb, (*terms, leaves.structure, leaves.specs), leaves.arrays, act)
        return leaves.restored(self._step.meet(self._rank, call))

    def _reducible(
        self, verb: str, op: Any, value: Any, *, counts: bool = True
    ) -> tuple[ArrayLeaves, Reduction]:
        reduction = reduce_op.parse(op)
        leaves = self._arrays(verb, value, counts=counts)
        for array in leaves.arrays:
            reduce_op.check_dtype(verb, reduction, array.dtype)
        return leaves, reduction

    def _arrays(self, verb: str, value: Any, *, counts: bool = True) -> ArrayLeaves:
        memory = self._placement.memory
        leaves = arrays_of(value, verb, self._replica_id, self.own, memory)
        if debugging.active is not None and counts:
            debugging.check_finite(verb, leaves.arrays)
        return leaves

    def _targets(self, out: Any, value: ArrayLeaves) -> list[Any]:
        """Return the arrays of ``out``; raise unless they fit the leaves of the value."""
        targets, structure = pytree.flatten(out)
        count = len(value.arrays)
        if len(targets) != count or value.structure not in (None, structure):
            expected = (
                "one array" if value.structure is None else describe_structure(value.structure)
            )
            raise BufferMismatchError(
                f"all_reduce: out must have the structure of value on replica {self._replica_id}: "
                f"expected {expected}, got {describe_structure(structure)}"
            )
        return [
            self._target(target, array) for target, array in zip(targets, value.arrays, strict=True)
        ]

    def _target(self, leaf: Any, array: Any) -> Any:
        refuse_masked(leaf, f"all_reduce: out of replica {self._replica_id}")
        if not isinstance(leaf, np.ndarray):
            if not interop.is_foreign(leaf):
                raise NotABufferError(
                    f"all_reduce: out must hold arrays, replica {self._replica_id} passed a "
                    f"{type(leaf).__name__}"
                )
            who = f"out of replica {self._replica_id}"
            leaf = self._placement.memory.view("all_reduce", leaf, who)
        is_writable = array_memory.holding(leaf).is_writable(leaf)
        if (leaf.shape, leaf.dtype) != (array.shape, array.dtype) or not is_writable:
            raise BufferMismatchError(
                f"all_reduce: out must be writable, {spec(array)}; replica "
                f"{self._replica_id} passed {spec(leaf)}, "
                f"{'writable' if is_writable else 'read-only'}"
            )
        return leaf


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


def _components_of(result: Any, rank: int, placement: Placement) -> Any:
    """Return a pytree with each ``PerReplica`` in it replaced by the component of one rank."""

    def component(leaf: Any) -> Any:
        is_distributed = isinstance(leaf, PerReplica)
        return regroup.own_component(leaf, rank, placement) if is_distributed else leaf

    return pytree.map_leaves(component, result)


def _copy_for_each(array: Any, into: Sequence[Any] | None, column: Sequence[Any]) -> Sequence[Any]:
    """Copy an array into each array of ``into``, or else next to each replica's own array."""
    memory = array_memory.holding(array)
    if into is None:
        return [memory.copy_to_device_of(array, own) for own in column]
    memory.overwrite(into, [array] * len(into))
    return into


def _per_replica_rows(columns: Sequence[Sequence[Any]], num_replicas: int) -> list[list[Any]]:
    """Transpose one list of results per leaf to one list of leaves per replica."""
    return [[column[rank] for column in columns] for rank in range(num_replicas)]
