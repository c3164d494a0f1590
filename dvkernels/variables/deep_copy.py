"""Deep copies of variables: taken between two steps, and reported to those that follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dvkernels import context
from dvkernels.variables.copies import Copies

__all__: list[str] = []

_CALLBACKS = object()  # its id is the key of the callbacks in the memo of a deep copy
DeepcopyCallback = Callable[[Any, Any], None]  # of a variable and its copy


def on_deepcopy(memo: dict[int, Any], callback: DeepcopyCallback) -> None:
    """Register ``callback(variable, copy)`` for each variable that this deep copy still copies."""
    memo.setdefault(id(_CALLBACKS), []).append(callback)


def report(memo: dict[int, Any], variable: Any, made: Any) -> None:
    """Call the callbacks of a deep copy for one variable and its copy."""
    for callback in memo.get(id(_CALLBACKS), ()):
        callback(variable, made)


def between_steps(copies: Copies) -> Copies:
    """Duplicate copies while no other thread runs a step; such a step is awaited."""
    if copies.server is not None:
        return copies.server.ask("deepcopy", type(copies).duplicate, copies)
    placement, frame = copies.placement, context.find()
    if placement is context.UNSCOPED or (frame is not None and frame.merging):
        return copies.duplicate()  # a single copy; or inside a step, which holds the lock
    what = f"deepcopy of variable {copies.name!r}"
    return placement.step_lock.between_steps(copies.duplicate, what)
