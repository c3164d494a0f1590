"""Ranges of the user in traces: named blocks and functions."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from dvkernels.profiler import tracing
from dvkernels.user_errors import brief

__all__ = ["range"]

P = ParamSpec("P")
R = TypeVar("R")


class _Stack(threading.local):
    """Open ranges of a thread, the innermost last: the range, its trace, and when it began."""

    def __init__(self) -> None:
        self.ranges: list[tuple[range, tracing.trace, int]] = []


_open = _Stack()


class range:
    """Name a block, or a function, in the trace: ``with range("forward"):`` or ``@range("loss")``.

    Parameters
    ----------
    name : str
        The name, which the trace shows on the lane of the thread, a replica for example.

    Raises
    ------
    TypeError
        ``name`` is not a string.

    Notes
    -----
    Ranges nest, and each thread has its own; one object may be entered by several threads, and
    again inside itself. Only a range whose block ends while the trace that it began in is being
    recorded is shown. Without a trace a range costs a fraction of a microsecond.

    Examples
    --------
    >>> import dvkernels as dv
    >>> @dv.profiler.range("forward")
    ... def forward(x):
    ...     with dv.profiler.range("square"):
    ...         return x * x
    >>> forward(3)
    9
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"range: the name is a string, got {brief(name)}")
        self.name = name

    def __enter__(self) -> Self:
        recording = tracing.active
        if recording is not None:
            _open.ranges.append((self, recording, recording.begin(self.name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ranges = _open.ranges
        # Those above it were left by an interrupt of their __exit__.
        while ranges and (ranges[-1][0] is self or any(each[0] is self for each in ranges)):
            found, recording, began = ranges.pop()
            if recording is tracing.active:
                recording.end(found.name, "range", began, None)
            if found is self:
                return

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return the function, each call of which is a block of this range."""

        @functools.wraps(function)
        def in_range(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return in_range
