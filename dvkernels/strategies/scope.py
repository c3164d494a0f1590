"""Scope of a strategy: the context manager that makes it the current one."""

from __future__ import annotations

from contextvars import Token
from typing import Generic, TypeVar

from dvkernels import context
from dvkernels.context import Frame
from dvkernels.errors import ContextError
from dvkernels.values.placement import Placement

__all__: list[str] = []

S = TypeVar("S")


class Scope(Generic[S]):
    """Context manager of ``strategy.scope()``; yields the strategy."""

    def __init__(self, strategy: S, placement: Placement) -> None:
        self._strategy = strategy
        self._placement = placement
        self._entered: list[tuple[Frame, Token[Frame]]] = []

    def __enter__(self) -> S:
        """Make the strategy the current one."""
        here = context.explicit()
        if here is not None and (here.replica is not None or here.placement is not self._placement):
            context.require_cross_replica(self._placement, "scope")
        merging = here is not None and here.merging
        frame = Frame(self._placement, self._strategy, merging=merging)
        self._entered.append((frame, context.enter(frame)))
        return self._strategy

    def __exit__(self, *_: object) -> None:
        """Restore the strategy that was current before."""
        if not self._entered:
            raise ContextError(
                f"the scope of {self._placement.name} was left without having been entered; use it "
                f"in a with statement"
            )
        frame, token = self._entered[-1]
        if context.explicit() is not frame:
            raise ContextError(
                f"the scope of {self._placement.name} was left out of order; leave the inner scope "
                f"first (use with statements)"
            )
        self._entered.pop()
        context.leave(token)
