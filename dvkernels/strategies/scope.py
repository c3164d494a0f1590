"""Scope of a strategy: the context manager that makes it the current one."""

from __future__ import annotations

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

    def __enter__(self) -> S:
        """Make the strategy the current one."""
        here = context.explicit()
        if here is not None and (here.replica is not None or here.placement is not self._placement):
            context.require_cross_replica(self._placement, "scope")
        merging = here is not None and here.merging
        context.enter(Frame(self._placement, self._strategy, None, merging, self, here))
        return self._strategy

    def __exit__(self, *_: object) -> None:
        """Restore the strategy that was current before."""
        current = frame = context.explicit()
        while frame is not None and frame.scope is not self:
            frame = frame.outer
        if frame is None:
            raise ContextError(
                f"the scope of {self._placement.name} was left without having been entered; use it "
                f"in a with statement"
            )
        if frame is not current:
            raise ContextError(
                f"the scope of {self._placement.name} was left out of order; leave the inner scope "
                f"first (use with statements)"
            )
        context.enter(frame.outer)  # one store: an interrupt finds the scope entered or left
