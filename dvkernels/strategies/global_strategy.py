"""Strategy of the whole process: that of all code outside every scope."""

from __future__ import annotations

from dvkernels import context
from dvkernels.context import Frame
from dvkernels.errors import ContextError
from dvkernels.strategies.base import Strategy

__all__ = ["set_strategy"]


def set_strategy(strategy: Strategy | None) -> None:
    """Set the strategy of the whole process, for all code outside every scope.

    Parameters
    ----------
    strategy : Strategy or None
        Applies as if its scope were entered; None resets to the default strategy.

    Raises
    ------
    ContextError
        Called inside a scope or a ``run``: meant to be called once, at the start of a program.
    TypeError
        Not a strategy.

    Examples
    --------
    >>> import dvkernels as dv
    >>> strategy = dv.MirroredStrategy(["cpu:0", "cpu:1"])
    >>> dv.set_strategy(strategy)
    >>> dv.get_strategy() is strategy
    True
    >>> dv.set_strategy(None)
    >>> strategy.close()
    """
    if context.explicit() is not None:
        raise ContextError(
            "set_strategy must not be called inside a strategy's scope or run; call it at the "
            "start of the program"
        )
    if strategy is None:
        context.set_global(None)
    elif isinstance(strategy, Strategy):
        context.set_global(Frame(strategy.placement, strategy))
    else:
        raise TypeError(f"set_strategy expected a strategy or None, got {type(strategy).__name__}")
