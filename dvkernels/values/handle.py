"""What an asynchronous call returns: a result that is on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from dvkernels.values.process_bound import ProcessBound

__all__ = ["Handle"]


@final
class Handle(ProcessBound):
    """The result of ``all_reduce_async``; made by it."""

    _bound_by = "it is on its way in one step; pass on what wait() returns"
    __slots__ = ("_finish", "_is_done", "_result")

    def __init__(self, is_done: Callable[[], bool], finish: Callable[[], Any]) -> None:
        self._is_done = is_done
        self._finish: Callable[[], Any] | None = finish
        self._result: Any = None

    def done(self) -> bool:
        """Return whether ``wait`` would return, or raise, at once."""
        return self._finish is None or self._is_done()

    def wait(self) -> Any:
        """Return the result, when every replica has issued the call and it is carried out.

        Returns
        -------
        nest of array
            New arrays that the caller owns; of a second call, the same ones.

        Raises
        ------
        CollectiveMismatchError, CollectiveTimeoutError
            As of a collective that waits; also after the step has failed elsewhere.
        """
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        return self._result

    def __repr__(self) -> str:
        return f"<Handle, {'done' if self.done() else 'under way'}>"
