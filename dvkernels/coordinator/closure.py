"""Closure: a scheduled call with its arguments, and the remote value that it will have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from typing import Any, final

from dvkernels.threads.claim import Claim
from dvkernels.threads.thread import Latch
from dvkernels.user_errors import brief

__all__ = ["RemoteValue"]


@final
class Closure:
    """A function and its arguments, and what has become of the call.

    It is run by the worker that takes its claim, or cancelled by whoever does. It ends once: with a
    result, the function's error, or a cancellation; ``done`` opens last.
    """

    __slots__ = (
        "args", "claim", "done", "error", "fn", "has_workers_values", "kwargs", "lost_by", "number",
        "once", "result", "runs", "sent", "variables",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        once: bool,
        has_workers_values: bool,
        variables: Context,
    ) -> None:
        self.number = number
        self.fn, self.args, self.kwargs = fn, args, kwargs
        self.once = once  # its writes take effect together, when it returns
        self.has_workers_values = has_workers_values  # among its arguments
        self.variables = variables  # of the caller of schedule
        self.sent: list[memoryview] = []  # the call as a message, for workers that are processes
        self.runs = 0
        self.lost_by: set[int] = set()  # workers that raised WorkerLostError
        self.claim = Claim()
        self.done = Latch()
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        """The size of the message."""
        return sum(part.nbytes for part in self.sent)

    def end(self, result: Any, error: BaseException | None) -> None:
        """Leave the outcome, and drop the user's objects that only a run needs."""
        self.result, self.error = result, error
        self.args, self.kwargs, self.sent, self.variables = (), {}, [], Context()
        self.done.open()

    def __str__(self) -> str:
        name = getattr(self.fn, "__qualname__", None) or brief(self.fn, 40)
        return f"call {self.number} of {name}"


@final
class RemoteValue:
    """Result that a scheduled call will have: :meth:`fetch` waits for it.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.ParameterServerStrategy(num_workers=2) as strategy:
    ...     coordinator = dv.ClusterCoordinator(strategy)
    ...     result = coordinator.schedule(lambda: 6 * 7)
    ...     result.fetch()
    42
    """

    __slots__ = ("_closure", "_wait")

    def __init__(self, closure: Closure, wait: Callable[[Closure], None]) -> None:
        self._closure = closure
        self._wait = wait

    def fetch(self) -> Any:
        """Wait for the call and return its result.

        Raises
        ------
        Exception
            That of the function, as it is, each time.
        CallCancelledError
            The call was not made: one before it had failed, or the coordinator was closed.
        CollectiveTimeoutError
            No call has ended for too long.
        ContextError
            The call has not ended, and this is a call of the coordinator: it would wait for itself.
        """
        closure = self._closure
        if not closure.done.is_open:
            self._wait(closure)
        if closure.error is not None:
            raise closure.error
        return closure.result

    def __repr__(self) -> str:
        closure = self._closure
        if not closure.done.is_open:
            state = "has not ended"
        elif closure.error is not None:
            state = f"raised {type(closure.error).__name__}"
        else:
            state = "has returned"
        return f"<RemoteValue: {closure} {state}>"
