"""Where am I: in a replica, in cross-replica context, or outside every strategy.

The current frame is a context variable, so it follows the caller into replica threads and stays
out of unrelated threads. Strategies sit above this module: a frame carries one without knowing it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dvkernels import reduce_op
from dvkernels.communicators.bucketing import all_reduce_each
from dvkernels.communicators.single import Single
from dvkernels.devices import array_memory, interop
from dvkernels.devices.base import Device
from dvkernels.devices.buffers import refuse_masked, spec
from dvkernels.errors import BufferMismatchError, ContextError, NotABufferError
from dvkernels.nest import words_of
from dvkernels.profiler import debugging
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.replicas.foreign_threads import UnscopedRendezvous
from dvkernels.replicas.rendezvous import CollectiveCall, Rendezvous
from dvkernels.values import function_checks, regroup, replica_weights
from dvkernels.values.array_leaves import ArrayLeaves, alike, arrays_of, gatherable
from dvkernels.values.distributed import PerReplica, is_integer
from dvkernels.values.handle import Handle
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound

__all__ = ["ReplicaContext", "get_replica_context", "in_cross_replica_context"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Frame:
    """One entry of the stack of contexts: a strategy, and in which role its code runs."""

    placement: Placement
    strategy: Any  # None: the default strategy
    replica: ReplicaContext | None = None  # None: cross-replica context
    merging: bool = False  # inside merge_call: a step of this strategy is under way


_current: ContextVar[Frame] = ContextVar("dvkernels_frame")
_global: Frame | None = None  # set by set_strategy
_make_default: Callable[[], Any] | None = None
_default: dict[str, Any] = {}  # the default strategy, once it has been asked for

# Outside every scope: one replica on one device.
UNSCOPED = Placement((Device("cpu", 0),), Single(), "the default strategy", is_default=True)


def install_default(make: Callable[[], Any]) -> None:
    """Say how the strategy that applies outside every scope is made (called by row 11)."""
    global _make_default
    _make_default = make


def default_strategy() -> Any:
    """Return the strategy that applies outside every scope, made when first asked for."""
    found = _default.get("strategy")
    if found is None:
        assert _make_default is not None
        found = _default.setdefault("strategy", _make_default())  # of two threads one makes it
    return found


def find() -> Frame | None:
    """Return the current frame, None outside every scope."""
    return _current.get(None) or _global


def enter(frame: Frame) -> Token[Frame]:
    """Make a frame the current one of this thread."""
    return _current.set(frame)


def leave(token: Token[Frame]) -> None:
    """Go back to the frame before."""
    _current.reset(token)


def explicit() -> Frame | None:
    """Return the frame that this thread entered, not counting ``set_strategy``."""
    return _current.get(None)


def set_global(frame: Frame | None) -> None:
    """Make a frame apply wherever no scope does."""
    global _global
    _global = frame


def get_strategy() -> Any:
    """Return the current strategy; outside every scope a default one of one replica."""
    frame = find()
    if frame is None or frame.placement is UNSCOPED:
        return default_strategy()
    return frame.strategy


def has_strategy() -> bool:
    """Return whether a scope, a run or ``set_strategy`` gives the current strategy.

    False in ``merge_call`` and ``run`` of the default strategy, too: that is still the default.
    """
    frame = find()
    return frame is not None and frame.placement is not UNSCOPED


def in_cross_replica_context() -> bool:
    """Return True in ``scope()`` and ``merge_call``, False in ``run`` and outside every scope."""
    frame = find()
    return frame is not None and frame.replica is None


def get_replica_context() -> ReplicaContext | None:
    """Return the context of this replica; None in cross-replica context.

    Outside every scope it is that of a single replica with id 0.
    """
    frame = find()
    if frame is None:
        return ReplicaContext(UNSCOPED, UnscopedRendezvous(), 0, None)
    return frame.replica


def check_turn(placement: Placement, what: str) -> None:
    """Raise if another thread runs a step of this strategy, which ``what`` would write amid."""
    frame = find()
    if (frame is None or not frame.merging) and placement.turn.is_elsewhere():
        raise ContextError(
            f"{what}: another thread runs a step of {placement.name}, and this one has no part in "
            f"it; a thread of a replica gets its context by contextvars.copy_context().run(fn), "
            f"other threads write between steps"
        )


def is_outside(frame: Frame | None) -> bool:
    """Return whether a frame is outside every scope: none, or merge_call of the default one."""
    return frame is None or (frame.placement is UNSCOPED and frame.replica is None)


def require_cross_replica(placement: Placement, verb: str) -> Frame | None:
    """Raise ``ContextError`` unless ``verb`` of this strategy may be called here."""
    frame = find()
    if frame is None or (frame.replica is None and frame.placement is placement):
        return frame
    if is_outside(frame):
        return None
    if frame.replica is not None:
        raise ContextError(
            f"{verb} needs cross-replica context, and this is replica "
            f"{frame.replica.replica_id_in_sync_group} of {frame.placement.name}; use the methods "
            f"of get_replica_context(), or merge_call to run a function once for all replicas"
        )
    raise ContextError(
        f"{verb} of {placement.name} was called under {frame.placement.name}; leave that "
        f"strategy's scope first, or use that strategy"
    )


class ReplicaContext(ProcessBound):
    """What a replica may know and do, from inside ``strategy.run``.

    Collectives meet the same call of the other replicas, leave ``value`` unchanged and return
    arrays that the caller owns. ``value`` may be any nest of arrays and numbers; a distributed
    value in it means this replica's own component. Replicas that disagree end the step with
    ``CollectiveMismatchError`` in all of them.
    """

    __slots__ = ("__weakref__", "_placement", "_rank", "_replica_id", "_step", "_strategy")
    _bound_by = (
        "it is the place of one replica in one step; call dv.get_replica_context() where it is "
        "needed, and pass on what it knows (replica_id_in_sync_group)"
    )

    def __init__(self, placement: Placement, step: Rendezvous, rank: int, strategy: Any) -> None:
        self._placement = placement
        self._step = step
        self._rank = rank
        self._replica_id = placement.first_replica + rank
        self._strategy = strategy

    @property
    def replica_id_in_sync_group(self) -> int:
        """The number of this replica, from 0."""
        return self._replica_id

    @property
    def rank_in_process(self) -> int:
        """The position of this replica among those of its process."""
        return self._rank

    @property
    def num_replicas_in_sync(self) -> int:
        """The number of replicas that take part in collectives."""
        return self._placement.num_replicas

    @property
    def device(self) -> Device:
        """Where this replica computes."""
        return self._placement.replica_devices[self._rank]

    @property
    def strategy(self) -> Any:
        """The strategy that runs this replica."""
        return default_strategy() if self._strategy is None else self._strategy

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
        """Reduce ``value`` over the replicas; each gets the result.

        Parameters
        ----------
        op : ReduceOp or str
            SUM, MEAN, MIN, MAX or PROD, or a ``CustomReduction``.
        value : nest of array or number
            Of the same structure, shapes and dtypes on every replica. Unchanged.
        weight : float, optional
            With MEAN: the result is the sum of weight x value over the sum of weights, so that
            uneven batches give the mean of all examples. 0 means not contributing, even where the
            value is NaN.
        out : nest of array, optional
            Receives the result; may be ``value`` itself.
        shared : bool
            Allow one read-only result for all replicas of this process: R + 1 arrays are moved
            instead of 2 R. Every replica must say the same; not together with ``out``.

        Returns
        -------
        nest of array
            New arrays that the caller owns, or ``out``, or read-only ones that all share.

        Raises
        ------
        UnsupportedDTypeError, ReduceOpError, NotABufferError, BufferMismatchError, ValueError
            Bad input, raised before this replica meets the others; the step ends in all.
        CollectiveMismatchError
            The replicas asked for different things. ``out`` is unchanged.

        Notes
        -----
        Every replica gets the same bits. 0-d inputs give 0-d arrays.
        """
        if weight is not None:
            weight = replica_weights.checked(self.own(weight), "all_reduce", reduce_op.parse(op))
        brought, reduction = self._reducible("all_reduce", op, value, counts=weight != 0)
        targets = self._targets(out, brought) if out is not None else None
        if shared and out is not None:
            raise ValueError("all_reduce: out is each replica's own, so it cannot be shared")
        communicator, dtypes = self._placement.communicator, [a.dtype for a in brought.held]
        workers = self._placement.workers

        def act(payloads: list[Any]) -> list[list[Any]]:
            columns: list[Any] = list(zip(*(payload[0] for payload in payloads), strict=True))
            kernel_op: Reduction = reduction
            if weight is not None:
                brought_by = [payload[2] for payload in payloads]
                shares = replica_weights.shares_over(brought_by, workers, "all_reduce")
                if shares is not None:
                    columns = replica_weights.shares_of(columns, shares)
                    kernel_op = ReduceOp.SUM
            outs = None
            if targets is not None:
                outs = list(zip(*(payload[1] for payload in payloads), strict=True))
            if not shared and all(
                column[0].dtype == dtype for column, dtype in zip(columns, dtypes, strict=True)
            ):
                reduced = all_reduce_each(communicator, columns, kernel_op, outs)
                return _per_replica_rows(reduced, len(payloads))
            singly: list[Sequence[Any]] = []
            for k, column in enumerate(columns):
                into = None if outs is None else outs[k]
                if shared:
                    one = communicator.reduce(column, kernel_op)
                    one = array_memory.holding(one).read_only(one.astype(dtypes[k], copy=False))
                    singly.append([one] * len(payloads))
                elif column[0].dtype == dtypes[k]:
                    singly.append(communicator.all_reduce(column, kernel_op, into))
                else:  # weighed halves
                    mean = communicator.reduce(column, kernel_op).astype(dtypes[k])
                    singly.append(_one_for_each(mean, into, column))
            return _per_replica_rows(singly, len(payloads))

        terms = (
            reduction.value,
            brought.structure,
            brought.specs,
            "weighted" if weight is not None else None,
            "into out" if out is not None else None,
            "shared" if shared else None,
        )
        payload = (brought.held, targets, weight)
        result = self._step.meet(self._rank, CollectiveCall("all_reduce", terms, payload, act))
        if out is None:
            return brought.nest(result)
        if targets is not None and brought.leaves is not None:
            brought.nest(targets)  # the streams of their libraries wait for the results
        return out

    def all_reduce_async(self, op: Reduction | str, value: Any) -> Handle:
        """Start an :meth:`all_reduce` and go on: it is carried out in the background.

        Parameters
        ----------
        op : ReduceOp or str
        value : nest of array or number
            Must not be written until ``wait`` has returned: it is read in between.

        Returns
        -------
        Handle
            ``wait()`` returns the reduction: new arrays that the caller owns.

        Raises
        ------
        UnsupportedDTypeError, ReduceOpError, NotABufferError
            Bad input.
        CollectiveMismatchError
            The replicas issued different calls.

        Notes
        -----
        The k-th call of a replica meets the k-th of the others, whatever they wait for between.
        A thread of the strategy carries out one call after another, each as soon as all replicas
        have issued it; a run ends when those are done. A handle that nobody waits for is fine.

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
        brought, reduction = self._reducible("all_reduce_async", op, value)
        communicator = self._placement.beside

        def act(payloads: list[Any]) -> list[list[Any]]:
            columns = zip(*payloads, strict=True)
            reduced = all_reduce_each(communicator, columns, reduction)
            return _per_replica_rows(reduced, len(payloads))

        terms = (reduction.value, brought.structure, brought.specs)
        step, rank = self._step, self._rank
        pending = step.issue(rank, CollectiveCall("all_reduce_async", terms, brought.held, act))
        return Handle(
            lambda: pending.done.is_open, lambda: brought.nest(step.await_pending(rank, pending))
        )

    def reduce_scatter(self, op: Reduction | str, value: Any) -> Any:
        """Reduce over the replicas; replica r gets part r of the result.

        Parts are those of ``numpy.array_split`` along axis 0: sizes differ by at most one, larger
        parts first. Parameters, errors and ownership are those of :meth:`all_reduce`.
        """
        brought, reduction = self._reducible("reduce_scatter", op, value)
        for array in brought.held:
            if array.ndim == 0:
                raise BufferMismatchError(
                    f"reduce_scatter splits along axis 0, and replica {self._replica_id} brought a "
                    f"0-d array; use all_reduce"
                )
        communicator = self._placement.communicator

        def act(payloads: list[Any]) -> list[list[Any]]:
            columns = [
                communicator.reduce_scatter(column, reduction)
                for column in zip(*payloads, strict=True)
            ]
            return _per_replica_rows(columns, len(payloads))

        return self._collect("reduce_scatter", (reduction.value,), brought, act)

    def all_gather(self, value: Any, axis: int = 0) -> Any:
        """Concatenate the replicas' values along ``axis``, in replica order; each gets all.

        Lengths along ``axis`` may differ; scalars are stacked. A negative axis counts from the
        end. Strings are as wide as the widest. Ownership and errors are those of
        :meth:`all_reduce`.
        """
        brought = self._arrays("all_gather", value)
        held, axes, specs = gatherable("all_gather", brought.held, axis, self._replica_id)
        brought = brought._replace(held=held, specs=specs)
        communicator, workers = self._placement.communicator, self._placement.workers

        def act(payloads: list[Any]) -> list[list[Any]]:
            columns = [
                communicator.all_gather(alike(column, workers), column_axis)
                for column, column_axis in zip(zip(*payloads, strict=True), axes, strict=True)
            ]
            return _per_replica_rows(columns, len(payloads))

        return self._collect("all_gather", (axis,), brought, act)

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """Return the value of replica ``root`` on every replica, as new arrays.

        Every replica passes a value of the same structure, shapes and dtypes; only the root's is
        read. ``root`` out of range raises ValueError.
        """
        if not is_integer(root) or not 0 <= root < self.num_replicas_in_sync:
            raise ValueError(
                f"broadcast: root must be a replica id from 0 to {self.num_replicas_in_sync - 1}, "
                f"got {root!r} on replica {self._replica_id}"
            )
        brought = self._arrays("broadcast", value)
        communicator = self._placement.communicator

        def act(payloads: list[Any]) -> list[list[Any]]:
            columns = [
                communicator.broadcast(column, int(root)) for column in zip(*payloads, strict=True)
            ]
            return _per_replica_rows(columns, len(payloads))

        return self._collect("broadcast", (int(root),), brought, act)

    def barrier(self) -> None:
        """Return when every replica has called this."""
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
            The same function on every replica; that of the first is called, while all wait. Over
            several workers it runs once on each, for the replicas there.
        args, kwargs
            Each leaf becomes a ``PerReplica`` of what the replicas passed; a variable that all
            of them passed stays that variable.

        Returns
        -------
        object
            What ``fn`` returned; of a ``PerReplica`` in it, this replica's component.
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
            frame = Frame(placement, self._strategy, merging=True)
            token = enter(frame)
            try:
                result = payloads[0][0](strategy, *joined_args, **joined_kwargs)
            finally:
                leave(token)
            return [_dealt(result, rank, placement) for rank in range(len(payloads))]

        structure = regroup.flatten((tuple(args), named))[1]
        request = CollectiveCall("merge_call", (structure,), (fn, args, named), act)
        return self._step.meet(self._rank, request)

    def meet(self, request: CollectiveCall) -> Any:
        """Bring a request of another module (a variable's write) to the other replicas."""
        return self._step.meet(self._rank, request)

    def own(self, value: Any) -> Any:
        """Return what a value means to this replica: its component of a distributed one."""
        return regroup.own_component(value, self._rank, self._placement)

    # -- what they share ------------------------------------------------------------------------

    def _collect(
        self,
        verb: str,
        terms: tuple[Any, ...],
        brought: ArrayLeaves,
        act: Callable[[list[Any]], Sequence[Any]],
    ) -> Any:
        request = CollectiveCall(
            verb, (*terms, brought.structure, brought.specs), brought.held, act
        )
        return brought.nest(self._step.meet(self._rank, request))

    def _reducible(
        self, verb: str, op: Any, value: Any, *, counts: bool = True
    ) -> tuple[ArrayLeaves, Reduction]:
        reduction = reduce_op.parse(op)
        brought = self._arrays(verb, value, counts=counts)
        for array in brought.held:
            reduce_op.check_dtype(verb, reduction, array.dtype)
        return brought, reduction

    def _arrays(self, verb: str, value: Any, *, counts: bool = True) -> ArrayLeaves:
        seen = self._placement.memory
        brought = arrays_of(value, verb, self._replica_id, self.own, seen)
        if debugging.active is not None and counts:
            debugging.check_finite(verb, brought.held)
        return brought

    def _targets(self, out: Any, brought: ArrayLeaves) -> list[Any]:
        leaves, structure = regroup.flatten(out)
        count = len(brought.held)
        if len(leaves) != count or brought.structure not in (None, structure):
            expected = "one array" if brought.structure is None else words_of(brought.structure)
            raise BufferMismatchError(
                f"all_reduce: out must have the structure of value on replica {self._replica_id}: "
                f"expected {expected}, got {words_of(structure)}"
            )
        return [self._target(leaf, array) for leaf, array in zip(leaves, brought.held, strict=True)]

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


def _dealt(result: Any, rank: int, placement: Placement) -> Any:
    """Return a nest with each ``PerReplica`` in it replaced by one replica's component."""

    def component(leaf: Any) -> Any:
        is_dealt = isinstance(leaf, PerReplica)
        return regroup.own_component(leaf, rank, placement) if is_dealt else leaf

    return regroup.map_leaves(component, result)


def _one_for_each(array: Any, into: Sequence[Any] | None, column: Sequence[Any]) -> Sequence[Any]:
    """Return an array for each replica: a copy beside what it brought, or where it is to go."""
    held = array_memory.holding(array)
    if into is None:
        return [held.beside(array, brought) for brought in column]
    held.overwrite(into, [array] * len(into))
    return into


def _per_replica_rows(columns: Sequence[Sequence[Any]], num_replicas: int) -> list[list[Any]]:
    """Turn one list of results per leaf into one list of leaves per replica."""
    return [[column[rank] for column in columns] for rank in range(num_replicas)]
