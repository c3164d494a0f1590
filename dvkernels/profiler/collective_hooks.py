"""Hooks of collectives: functions of the user, the trace and debug mode, called around each call.

Without any, ``active`` is None, and a collective reads it once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from time import perf_counter_ns
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from dvkernels import pytree, reduce_op, user_errors
from dvkernels.profiler import process_identity

__all__ = ["CollectiveRecord", "on_collective"]

_nbytes_of = operator.attrgetter("nbytes")
_REDUCTIONS = {"all_reduce", "all_reduce_async", "reduce_scatter"}  # op is their first term


class CollectiveRecord(NamedTuple):
    """A replica's call of a collective, as hooks of :func:`on_collective` get it.

    Attributes
    ----------
    name : str
        The verb: ``"all_reduce"``, ``"barrier"``, ``"Variable.assign"``.
    replica, worker : int
        The replica, numbered over all workers, and the worker of this process.
    step : int
        The number of the strategy's step, from 1; 0 outside of a step, and in a step that began
        before any hook was registered.
    op : str
        The reduction, such as ``"sum"``; ``""`` where there is none.
    dtype : str
        Of the replica's first array; ``""`` where it contributes none.
    nbytes : int
        Of the arrays that the replica contributes.
    seconds : float or None
        From the call to its result or error [s]; None before it.
    error : BaseException or None
        What the call raises in this replica; None but in ``abort``.
    arrays : tuple of array
        Those that the replica contributes, not copied; only in ``before``, as the result may be
        written over them.

    Examples
    --------
    >>> import dvkernels as dv
    >>> def show(record):
    ...     print(record.name, record.op, record.dtype, record.nbytes)
    >>> with dv.OneDeviceStrategy("cpu:0") as strategy, dv.profiler.on_collective(before=show):
    ...     strategy.run(lambda: dv.get_replica_context().all_reduce("sum", 1.0))
    all_reduce sum float64 8
    PerReplica(0: array(1.))
    """

    name: str
    replica: int
    worker: int
    step: int
    op: str
    dtype: str
    nbytes: int
    seconds: float | None = None
    error: BaseException | None = None
    arrays: tuple[Any, ...] = ()


Hook = Callable[[CollectiveRecord], object]


class StepPlace(Protocol):
    """Place of a replica: of its step, and its strategy."""

    @property
    def strategy(self) -> str: ...

    @property
    def step(self) -> int: ...

    @property
    def algorithm_of(self) -> Callable[[int, int], str] | None:
        """Returns the algorithm, given the number of replicas and the bytes; None: unknown."""


class CollectiveEvent:
    """Call of a collective by one replica; after the hooks ``before`` it holds no array."""

    __slots__ = (
        "began", "contributed", "dtype", "ended", "error", "nbytes", "num_replicas", "place",
        "replica", "terms", "verb",
    )  # fmt: skip

    terms: tuple[Any, ...]
    contributed: Any  # by the replica; set for the hooks ``before``, and None after them

    def __init__(self, call: Any, step: Any, replica: int) -> None:
        verb, self.terms, contributed, _ = call
        self.verb: str = verb
        self.place: StepPlace = step.label
        self.replica: int = step.first_replica + replica
        self.num_replicas: int = step.num_replicas
        self.error: BaseException | None = None
        self.contributed = None
        if type(contributed) is tuple and contributed:
            contributed = contributed[0]
        if type(contributed) is list and contributed:
            first = contributed[0]
            self.dtype = first.dtype
            is_one = len(contributed) == 1
            self.nbytes = first.nbytes if is_one else sum(map(_nbytes_of, contributed))
        elif contributed is None or verb == "merge_call":
            self.dtype, self.nbytes = None, 0
        else:
            self.dtype = getattr(contributed, "dtype", None)
            self.nbytes = getattr(contributed, "nbytes", 0)
        self.began = self.ended = perf_counter_ns()

    def __str__(self) -> str:
        return call_text(self.verb, self.terms)

    @property
    def is_async(self) -> bool:
        """Whether the call is awaited apart."""
        return self.verb == "all_reduce_async"

    @property
    def op(self) -> str:
        """The name of the reduction; "" where there is none."""
        if self.verb in _REDUCTIONS:
            return user_errors.text_of(self.terms[0])
        names = (t for t in self.terms if type(t) is str and t in reduce_op.BY_NAME)
        return "" if self.verb.startswith("Variable") else next(names, "")

    def record(self, error: BaseException | None = None) -> CollectiveRecord:
        """Return the record that hooks get, before the call or after it."""
        is_before = self.ended == self.began
        return CollectiveRecord(
            self.verb, self.replica, process_identity.number(), self.place.step, self.op,
            "" if self.dtype is None else str(self.dtype), self.nbytes,
            None if is_before else (self.ended - self.began) / 1e9, error,
            _arrays_in(self.contributed),
        )  # fmt: skip


def _arrays_in(contributed: Any) -> tuple[Any, ...]:
    """Return the arrays of a contribution: one, a list of them, or one of these and a weight."""
    if type(contributed) is tuple and contributed:
        contributed = contributed[0]
    if type(contributed) is not list:
        contributed = [contributed]
    return tuple(each for each in contributed if hasattr(each, "dtype"))


def call_text(verb: str, terms: tuple[Any, ...]) -> str:
    """Return the text of a call with its terms."""
    texts = (
        pytree.describe_structure(term)
        if isinstance(term, pytree.Structure)
        else user_errors.text_of(term)
        for term in terms
        if term is not None
    )
    return f"{verb}({', '.join(text for text in texts if text)})"


class Observer(Protocol):
    """Observer of collectives; ``abort`` takes the place of ``after`` where the call raises."""

    @property
    def before(self) -> Callable[[CollectiveEvent], None] | None: ...

    def after(self, event: CollectiveEvent) -> None: ...

    def abort(self, event: CollectiveEvent) -> None: ...


# The observers, in the order of their registration; None: there is none.
active: tuple[Observer, ...] | None = None


def add_observer(observer: Observer) -> None:
    """Add an observer of all later calls."""
    global active
    active = (*(active or ()), observer)


def remove_observer(observer: Observer) -> None:
    """Remove an observer, if it is there."""
    global active
    active = tuple(each for each in active or () if each is not observer) or None


class on_collective:
    """Call functions of yours around each collective of each replica, until they are removed.

    Parameters
    ----------
    before, after, abort : callable, optional
        Each gets a :class:`CollectiveRecord`: ``before`` when the replica calls the collective,
        ``after`` when it has its result, ``abort`` when the call raises. At least one is given.

    Returns
    -------
    on_collective
        ``remove()`` removes the functions; as a context manager it does so at the end.

    Raises
    ------
    TypeError
        One of them cannot be called, or none is given.

    Notes
    -----
    They run on the thread of the replica, which the others wait for. They must not call
    collectives. An error in ``before`` or ``after`` is an error of the replica: the step ends in
    all replicas, and ``run`` raises it with a note. An error in ``abort`` becomes a note of the
    error that it was called for. They are called for collectives inside ``run``, writes of
    variables and steps of optimizers included; of ``all_reduce_async``, ``before`` when it is
    issued, and ``after`` or ``abort`` when ``wait`` ends. Nothing is called for what happened
    before the replicas meet: an argument that was refused.

    Examples
    --------
    >>> import dvkernels as dv
    >>> seen = []
    >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    ...     with dv.profiler.on_collective(after=seen.append):
    ...         _ = strategy.run(lambda: dv.get_replica_context().all_reduce("sum", 1.0))
    >>> sorted((record.name, record.replica, record.op, record.nbytes) for record in seen)
    [('all_reduce', 0, 'sum', 8), ('all_reduce', 1, 'sum', 8)]
    """

    def __init__(
        self,
        before: Hook | None = None,
        after: Hook | None = None,
        abort: Hook | None = None,
    ) -> None:
        named = {"before": before, "after": after, "abort": abort}
        for name, hook in named.items():
            if hook is not None and not callable(hook):
                raise TypeError(
                    f"on_collective: {name} is a function of one record, got "
                    f"{user_errors.brief(hook)}"
                )
        if not any(hook is not None for hook in named.values()):
            raise TypeError("on_collective: give at least one of before, after and abort")
        self._hooks = named
        add_observer(self)

    def remove(self) -> None:
        """Remove the functions: no later collective calls them. Safe to call again."""
        remove_observer(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def before(self, event: CollectiveEvent) -> None:
        """Call the user's ``before``."""
        self._call("before", event)

    def after(self, event: CollectiveEvent) -> None:
        """Call the user's ``after``."""
        self._call("after", event)

    def abort(self, event: CollectiveEvent) -> None:
        """Call the user's ``abort``, whose error becomes a note."""
        try:
            self._call("abort", event)
        except Exception as error:
            if event.error is not None and error is not event.error:
                user_errors.annotate(
                    event.error, f"the hook abort of on_collective raised "
                    f"{user_errors.describe(error)}"
                )  # fmt: skip

    def _call(self, when: str, event: CollectiveEvent) -> None:
        hook = self._hooks[when]
        if hook is None:
            return
        try:
            hook(event.record(event.error))
        except BaseException as error:
            user_errors.annotate(
                error, f"raised by the hook {when} of on_collective, for {event.verb} of replica "
                f"{event.replica}"
            )  # fmt: skip
            raise
