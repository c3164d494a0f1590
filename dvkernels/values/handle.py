"""Handle of an asynchronous collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from dvkernels.values.process_bound import ProcessBound

__all__ = ["Handle"]


@final
class Handle(ProcessBound):
    """Handle of an ``all_reduce_async``: tells whether it is done, and waits for its result."""

    _bound_by = "its collective is under way in one step; pass on the result of wait()"
    __slots__ = ("_finish", "_is_done", "_result")

    def __init__(self, is_done: Callable[[], bool], finish: Callable[[], Any]) -> None:
        self._is_done = is_done
        self._finish: Callable[[], Any] | None = finish
        self._result: Any = None

    def done(self) -> bool:
        """Return whether ``wait`` would return or raise without blocking."""
        return self._finish is None or self._is_done()

    def wait(self) -> Any:
        """Block until the collective is complete, and return its result.

        Returns
        -------
        pytree of array
            New arrays that the caller owns, of the shapes and dtypes that were passed. A second
            call returns the same arrays.

        Raises
        ------
        CollectiveMismatchError, CollectiveTimeoutError
            As for a blocking collective; also if the step has failed on another replica.
        """
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        return self._result

    def __repr__(self) -> str:
        return f"<Handle, {'done' if self.done() else 'under way'}>"
