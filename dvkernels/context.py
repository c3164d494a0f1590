"""Current context of the caller: the stack of frames, each of a strategy or of one replica.

The current frame is a context variable, so replica threads inherit it from the caller of ``run``,
and unrelated threads do not see it. Strategies lie above this module: a frame holds them as
``Any``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

from dvkernels.communicators.single import Single
from dvkernels.devices.device import Device
from dvkernels.errors import ContextError
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.pending import PendingCall
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.values import regroup
from dvkernels.values.handle import Handle
from dvkernels.values.placement import Placement
from dvkernels.values.random_draws import RandomDraws

__all__ = ["get_strategy", "has_strategy", "in_cross_replica_context"]


class Replica(RandomDraws):
    """Replica of one step: its identity, and its part in the rendezvous."""

    __slots__ = ("__weakref__", "_rank", "_replica_id", "_step", "_strategy", "placement")

    trace: Any = None  # of a replica of a step that JAX traces: the values of its variables

    def __init__(self, placement: Placement, step: Rendezvous, rank: int, strategy: Any) -> None:
        self.placement = placement
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
    def item_index(self) -> int | None:
        """The index of the item in a function of ``strategy.map``; None in ``run``."""
        return self._step.item_index

    @property
    def num_replicas_in_sync(self) -> int:
        """The number of replicas that take part in collectives, over all workers."""
        return self.placement.num_replicas

    @property
    def device(self) -> Device:
        """The device of this replica."""
        return self.placement.replica_devices[self._rank]

    @property
    def strategy(self) -> Any:
        """The strategy that runs this replica."""
        return default_strategy() if self._strategy is None else self._strategy

    def __repr__(self) -> str:
        return (
            f"<replica {self._replica_id} of {self.num_replicas_in_sync} on {self.device}, "
            f"{self.placement.name}>"
        )

    def own(self, value: Any) -> Any:
        """Return this replica's component of a distributed value; a plain value as it is."""
        return regroup.own_component(value, self._rank, self.placement)

    def meet(self, call: CollectiveCall) -> Any:
        """Take part in a collective call; return this replica's result."""
        return self._step.meet(self._rank, call)

    def issue(self, call: CollectiveCall, restored: Callable[[Any], Any]) -> Handle:
        """Issue a collective call; the handle waits for its result, given to ``restored``."""
        step, rank = self._step, self._rank
        pending: PendingCall = step.issue(rank, call)
        return Handle(
            lambda: pending.done.is_open, lambda: restored(step.await_pending(rank, pending))
        )


@dataclass(frozen=True, eq=False)
class Frame:
    """Entry of the stack of contexts: a strategy, and whether its code runs in a replica."""

    placement: Placement
    strategy: Any  # None: the default strategy
    replica: Any = None  # a ReplicaContext; None: cross-replica context
    merging: bool = False  # inside merge_call: a step of this strategy is under way
    scope: Any = None  # the scope that entered it; None: a run, merge_call or update
    outer: Frame | None = None  # of a frame of a scope: the one before


_current: ContextVar[Frame | None] = ContextVar("dvkernels_frame")
_global: Frame | None = None  # set by set_strategy
_make_default: Callable[[], Any] | None = None
_default: dict[str, Any] = {}  # the default strategy, once it has been created

# Outside every scope: one replica on one device.
UNSCOPED = Placement((Device("cpu", 0),), Single(), "the default strategy", is_default=True)


def install_default(make: Callable[[], Any]) -> None:
    """Set the factory of the default strategy; the strategies package, above this one, calls it."""
    global _make_default
    _make_default = make


def default_strategy() -> Any:
    """Return the strategy that applies outside every scope, creating it at the first call."""
    strategy = _default.get("strategy")
    if strategy is None:
        assert _make_default is not None
        strategy = _default.setdefault("strategy", _make_default())  # the first thread wins
    return strategy


def find() -> Frame | None:
    """Return the current frame, None outside every scope."""
    return _current.get(None) or _global


def enter(frame: Frame | None) -> Token[Frame | None]:
    """Make a frame the current one of this thread."""
    return _current.set(frame)


def leave(token: Token[Frame | None]) -> None:
    """Restore the frame before."""
    _current.reset(token)


def explicit() -> Frame | None:
    """Return the frame that this thread entered, disregarding ``set_strategy``."""
    return _current.get(None)


def set_global(frame: Frame | None) -> None:
    """Set the frame of all code outside every scope."""
    global _global
    _global = frame


def get_strategy() -> Any:
    """Return the current strategy; outside every scope the default strategy of one replica.

    Returns
    -------
    Strategy
        That of the scope or the replica in which the caller is.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.get_strategy().num_replicas_in_sync
    1
    """
    frame = find()
    if frame is None or frame.placement is UNSCOPED:
        return default_strategy()
    return frame.strategy


def has_strategy() -> bool:
    """Return whether a strategy other than the default one is current.

    Returns
    -------
    bool
        True in a scope, ``run``, ``merge_call`` or ``update``, and after ``set_strategy``. False
        outside of these, and in ``run`` and ``merge_call`` of the default strategy.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.OneDeviceStrategy("cpu:0").scope():
    ...     dv.has_strategy()
    True
    >>> dv.has_strategy()
    False
    """
    frame = find()
    return frame is not None and frame.placement is not UNSCOPED


def in_cross_replica_context() -> bool:
    """Return whether the caller is in cross-replica context.

    Returns
    -------
    bool
        True in ``scope()``, ``merge_call`` and ``update``; False in ``run`` and outside every
        scope.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.OneDeviceStrategy("cpu:0").scope():
    ...     dv.in_cross_replica_context()
    True
    """
    frame = find()
    return frame is not None and frame.replica is None


def check_no_step_elsewhere(placement: Placement, what: str) -> None:
    """Raise ``ContextError`` if ``what`` would write while another thread runs a step."""
    frame = find()
    if placement.step_lock.farms:
        placement.step_lock.check_free(what)
    if (frame is None or not frame.merging) and placement.step_lock.is_elsewhere():
        raise ContextError(
            f"{what}: another thread runs a step of {placement.name}, and this one has no part in "
            f"it; run the function of a replica's thread by contextvars.copy_context().run(fn), "
            f"and write from other threads between steps"
        )


def is_outside(frame: Frame | None) -> bool:
    """Return whether a frame is outside every scope: None, or the default strategy's merge_call."""
    return frame is None or (frame.placement is UNSCOPED and frame.replica is None)


def require_cross_replica(
    placement: Placement, verb: str, needs_replicas: bool = False
) -> Frame | None:
    """Raise ``ContextError`` unless ``verb`` of this strategy may be called here.

    A verb that needs the replicas may not be called while a map of the strategy is open.
    """
    frame = find()
    is_here = frame is None or (frame.replica is None and frame.placement is placement)
    if is_here or is_outside(frame):
        if needs_replicas and placement.step_lock.farms:
            placement.step_lock.check_free(verb)
        return frame if is_here else None
    assert frame is not None
    if frame.replica is not None and frame.replica.item_index is not None:
        raise ContextError(
            f"{verb} was called in a function of map, for item {frame.replica.item_index}, on "
            f"replica {frame.replica.replica_id_in_sync_group} of {frame.placement.name}: there "
            f"each replica works by itself; call {verb} on the results, outside"
        )
    if frame.replica is not None:
        here = "a compiled step"  # where the id is traced
        if frame.replica.trace is None:
            here = f"replica {frame.replica.replica_id_in_sync_group}"
        raise ContextError(
            f"{verb} needs cross-replica context, and this is {here} of "
            f"{frame.placement.name}; use the methods "
            f"of get_replica_context(), or merge_call to run a function once for all replicas"
        )
    raise ContextError(
        f"{verb} of {placement.name} was called under {frame.placement.name}; leave that "
        f"strategy's scope first, or use that strategy"
    )
