"""Debug mode: checks of every step for NaN, drift and stalls, with the replica and the step named.

It is off by default, and then costs one read of ``active`` per call. Findings are raised, or go to
the logger ``dvkernels``, whose records have the attributes ``replica`` and ``step``.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels import reduce_op, thread_frames, user_errors
from dvkernels.errors import NonFiniteError
from dvkernels.profiler import collective_hooks
from dvkernels.profiler.collective_hooks import CollectiveEvent

__all__ = ["debug"]

_STALL_SECONDS = 30.0
_REMEMBERED = 100  # collectives in the flight recorder
_here = threading.local()  # .place: the RunningReplica of this thread


class _ReplicaFilter(logging.Filter):
    """Log filter that adds the replica and the step to each record; "-" outside of a step."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes, and keep the record."""
        place = getattr(_here, "place", None)
        if not hasattr(record, "replica"):
            record.replica = "-" if place is None else place.replica
        if not hasattr(record, "step"):
            record.step = "-" if place is None else place.step
        return True


LOGGER = logging.getLogger("dvkernels")
LOGGER.addHandler(logging.NullHandler())
LOGGER.addFilter(_ReplicaFilter())


class RunningReplica(NamedTuple):
    """The replica that a thread runs, and its step and strategy."""

    strategy: str
    step: int
    replica: int
    algorithm_of: Callable[[int, int], str] | None = None  # see CollectiveEvent

    def __str__(self) -> str:
        return f"replica {self.replica}, step {self.step} of {self.strategy}"


class DebugState:
    """State of debug mode: the flight recorder, and the reads of ON_READ variables."""

    def __init__(self, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds
        self._entries: collections.deque[CollectiveEvent] = collections.deque(maxlen=_REMEMBERED)
        self._generation = 0
        self._reads: dict[int, tuple[int, int]] = {}
        self._warned: set[int] = set()

    # -- the flight recorder: an observer of collective_hooks -------------------------------------

    def before(self, event: CollectiveEvent) -> None:
        """Record in the flight recorder that a replica called a collective."""
        self._entries.append(event)

    def after(self, event: CollectiveEvent) -> None:
        """Record nothing more."""

    abort = after

    def dump(self, strategy: str, step: int, error: BaseException) -> None:
        """Log the last collectives of a strategy, after a step has failed."""
        now = time.perf_counter_ns()
        lines = [
            f"  {(now - event.began) / 1e6:10.3f} ms ago: step {event.place.step}, replica "
            f"{event.replica} called {event}"
            for event in self._entries
            if event.place.strategy == strategy
        ]
        listed = "\n".join(lines) or "  none"
        LOGGER.error(
            "step %d of %s failed with %s\nthe last collectives:\n%s",
            step, strategy, user_errors.describe(error), listed,
            extra={"step": step},
        )  # fmt: skip

    # -- stalls ---------------------------------------------------------------------------------

    def report_stall(self, place: RunningReplica, doing: str, threads: Sequence[int]) -> None:
        """Log that a replica is waiting, with the Python stack of each replica's thread."""
        frames = thread_frames.current_frames()
        stacks = "\n".join(
            f"replica {replica}:\n{_stack(frames.get(ident))}"
            for replica, ident in enumerate(threads)
        )
        LOGGER.warning(
            "step %d of %s: replica %d has waited for %g s: %s\n%s",
            place.step, place.strategy, place.replica, self.stall_seconds, doing, stacks,
            extra={"step": place.step, "replica": place.replica},
        )  # fmt: skip

    # -- redundant communication ----------------------------------------------------------------

    def next_step(self) -> None:
        """Begin a step: reads after it may give new values."""
        self._generation += 1

    def note_aggregate(self, variable: int, name: str) -> None:
        """Count an aggregating read of a variable; warn at the second one within a step."""
        generation, count = self._reads.get(variable, (-1, 0))
        count = count + 1 if generation == self._generation else 1
        self._reads[variable] = self._generation, count
        if count > 1 and variable not in self._warned:
            self._warned.add(variable)
            LOGGER.warning(
                "variable %r is ON_READ and was read %d times without a step between: each read "
                "aggregates its copies anew; read it once and keep the value",
                name, count,
            )  # fmt: skip

    def note_written(self, variable: int) -> None:
        """Record a write in cross-replica context: the next read is not redundant."""
        self._reads.pop(variable, None)


# The state while debug mode is on; None: it is off.
active: DebugState | None = None


class debug:
    """Switch debug mode on or off; as a context manager, restore the previous mode at the end.

    Parameters
    ----------
    enabled : bool
        True to switch it on, False to switch it off.
    stall_seconds : float
        The duration after which a wait in a collective is reported [s].

    Raises
    ------
    TypeError
        ``enabled`` is not a bool.
    ValueError
        ``stall_seconds`` is not a positive number.

    Notes
    -----
    While it is on:

    * NaN or infinity in a value passed to a collective, written to a variable, or found in a
      variable after a step raises a ``NonFiniteError`` that names the variable or collective, the
      replica and the step. Values of weight 0 are not checked.
    * After each step and each ``update`` the copies of ON_WRITE variables are compared; if they
      differ, ``DriftError`` is raised.
    * A wait in a collective of more than ``stall_seconds`` is logged as a warning: which replica
      waits where, with the Python stack of each replica.
    * When a step fails, the last 100 collectives are logged as an error.
    * Redundant cross-replica reads of an ON_READ variable within a step are logged as a warning,
      once per variable.

    Records of the logger ``dvkernels`` have the attributes ``replica`` and ``step``. The logger is
    silent unless logging is configured. The cost is one pass over each checked array, and a
    comparison of all copies after each step. Debug mode applies to the whole process. An interrupt
    before the first line of ``__exit__`` leaves it on; ``dv.debug(False)`` switches it off.

    Examples
    --------
    >>> import dvkernels as dv
    >>> weight = dv.Variable([1.0])
    >>> with dv.debug():
    ...     weight.assign([float("nan")])
    Traceback (most recent call last):
    ...
    dvkernels.errors.NonFiniteError: assign of variable ...
    """

    def __init__(self, enabled: bool = True, *, stall_seconds: float = _STALL_SECONDS) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"debug: enabled is True or False, got {enabled!r}")
        try:
            seconds = float(stall_seconds)
        except (TypeError, ValueError):
            seconds = -1.0
        if not seconds > 0:
            raise ValueError(f"debug: stall_seconds is a positive number, got {stall_seconds!r}")
        self._before = active
        _switch_to(DebugState(seconds) if enabled else None)

    def __enter__(self) -> debug:
        return self

    def __exit__(self, *_: object) -> None:
        _switch_to(self._before)


def _switch_to(state: DebugState | None) -> None:
    global active
    kept = [each for each in collective_hooks.active or () if each is not active]
    observers = (*kept, state) if state is not None else (*kept,)
    # Both in one statement without a call, in which no interrupt strikes.
    active, collective_hooks.active = state, observers or None


def here() -> RunningReplica | None:
    """Return the replica that this thread runs, if debug mode was on when its step began."""
    return getattr(_here, "place", None)


def enter(place: RunningReplica | None) -> RunningReplica | None:
    """Set the replica that this thread runs; return the previous one."""
    before = here()
    _here.place = place
    return before


def check_finite(what: str, arrays: Iterable[Any]) -> None:
    """Raise ``NonFiniteError`` if an array contains NaN or infinity; called in debug mode only."""
    for array in arrays:
        if reduce_op.kind(array.dtype) not in "fc":
            continue
        finite = np.isfinite(array)
        if finite.all():
            continue
        bad = np.argwhere(~np.atleast_1d(finite))
        values = np.atleast_1d(array)
        first = tuple(int(k) for k in bad[0])
        num_nan = int(np.isnan(values).sum())
        place = here()
        raise NonFiniteError(
            f"{what}: {num_nan} NaN and {len(bad) - num_nan} infinite of {array.size} elements, "
            f"the first at {first if array.ndim else '()'}: {values[first]}; "
            + ("outside of a run" if place is None else str(place))
        )


def _stack(frame: types.FrameType | None) -> str:
    if frame is None:
        return "  it is not running\n"
    return "".join(traceback.format_stack(frame))
