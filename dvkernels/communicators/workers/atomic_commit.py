"""Atomic commitment: an action of all workers, who exchange its outcomes, succeeds on all or none.

This is for actions that end on every worker, such as reading a batch or writing a file. A worker
that fails where others already wait in a collective announces that instead: ``consistency.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dvkernels.user_errors import describe

__all__: list[str] = []

# All-gather of a small object: returns the objects of all workers, in order.
Exchange = Callable[[Any], list[Any]]


class ActionOutcome(NamedTuple):
    """Result of an action on one worker, or the text of its error and the index of its class."""

    result: Any = None
    failure: str | None = None
    kind: int = 0


def results_of_all(
    exchange: Exchange,
    act: Callable[[], Any],
    classes: Sequence[type[Exception]],
    message: Callable[[int, str], str],
) -> list[Any]:
    """Call ``act`` on every worker; return its results, which should be small, of all workers.

    If it raised, all workers raise once all have called it, an error of the same one of
    ``classes``, so that all programs take the same branch: the class of the first failed worker,
    or the last one if its error is of none. Workers whose error is of that class raise it, the
    others one with the text ``message(worker, failure)``.
    """
    error: Exception | None = None
    try:
        own = ActionOutcome(act())
    except Exception as failure:
        error = failure
        kinds = [k for k, each in enumerate(classes) if isinstance(failure, each)]
        own = ActionOutcome(None, describe(failure), min(kinds, default=len(classes) - 1))
    outcomes: list[ActionOutcome] = exchange(own)
    for worker, outcome in enumerate(outcomes):
        if outcome.failure is not None:
            if error is not None and outcome.kind == own.kind:
                raise error
            raise classes[outcome.kind](message(worker, outcome.failure)) from error
    return [outcome.result for outcome in outcomes]


def first_difference(
    descriptions: Iterable[Mapping[str, Any]], absent: Any
) -> tuple[str, list[Any]] | None:
    """Return the first name under which workers have different values, and the values of all."""
    each = list(descriptions)
    for name in dict.fromkeys(name for description in each for name in description):
        found = [description.get(name, absent) for description in each]
        if any(value != found[0] for value in found):
            return name, found
    return None
