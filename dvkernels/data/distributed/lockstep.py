"""What workers tell each other before the first step, and where needed at each.

All of them take a step or none does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dvkernels import user_errors
from dvkernels.data.node import Length
from dvkernels.errors import DatasetError

__all__ = ["Exchange", "StartReport", "StepReport", "agree", "agree_on_start", "report"]

# Given a small object, returns those of all workers, in their order.
Exchange = Callable[[Any], list[Any]]


class StartReport(NamedTuple):
    """What a worker is about to read, and from where."""

    pipeline: tuple[str, ...]
    length: Length
    epoch: int
    position: int
    fingerprint: str | None = None


class StepReport(NamedTuple):
    """What a worker tells the others about its step."""

    epoch: int = 0
    step: int = 0  # of the epoch; 0 where workers count elements of their own
    has_batch: bool = False
    progress: Any = None  # of this worker: {lane: position}, or the state of its own dataset
    empty: Any = None  # an element without rows, for those that have none left
    failure: str | None = None


def report(exchange: Exchange, error: Exception) -> None:
    """Tell the others that this worker has failed; :func:`agree` raises there."""
    exchange(StepReport(failure=user_errors.in_words(error)))


def agree_on_start(exchange: Exchange, own: StartReport) -> None:
    """Tell the others what is about to be read; return if it is the same everywhere.

    Raises
    ------
    DatasetError
        It is not: on every worker alike, so that none takes a step.
    """
    starts: list[StartReport] = _of_one_kind(exchange(own))
    for name, remedy in _REMEDIES.items():
        found = [getattr(start, name) for start in starts]
        if all(value == found[0] for value in found):
            continue
        if name == "pipeline":
            name, found = _first_difference(found)
        raise DatasetError(
            f"next(iterator): expected one dataset, at one place, on all workers; its {name} is "
            f"{_by_worker(found)}; {remedy}. No worker has taken the step"
        )


_REMEDIES = {
    "pipeline": "build the dataset alike everywhere, with the same numbers, and sort the paths: "
    "machines list a folder in different orders. A dataset of its own for each worker is what "
    "distribute_datasets_from_function is for",
    "length": "build the dataset alike everywhere, of the same data",
    "epoch": "call iter() equally often on every worker, or choose the epoch with set_epoch",
    "position": "load the same state on every worker",
    "fingerprint": "the data differ, or their order does: read the same data everywhere, and sort "
    "what a folder or a set lists",
}


def _first_difference(pipelines: Sequence[Sequence[str]]) -> tuple[str, list[str]]:
    """Return which link of the pipelines differs, and what it is on each worker."""
    links = itertools.zip_longest(*pipelines, fillvalue="missing")
    place, found = next(
        (place, list(link)) for place, link in enumerate(links) if len(set(link)) > 1
    )
    return f"link {place}", found


def _by_worker(found: Sequence[Any]) -> str:
    """Say which workers have which value: ``3 on workers 0 and 2, 4 on worker 1``."""
    holders: dict[Any, list[str]] = {}
    for worker, value in enumerate(found):
        holders.setdefault(value, []).append(str(worker))
    return ", ".join(
        f"{value} on worker{'s' * (len(workers) > 1)} {' and '.join(workers)}"
        for value, workers in holders.items()
    )


def _of_one_kind(words: list[Any]) -> list[Any]:
    """Return what the workers told each other; raise if one failed, or told something else."""
    for worker, word in enumerate(words):
        if isinstance(word, StepReport) and word.failure is not None:
            raise DatasetError(
                f"worker {worker} could not read its batch: {word.failure}; no worker has "
                f"taken the step, and next() tries it again"
            )
    beginning = [str(worker) for worker, word in enumerate(words) if isinstance(word, StartReport)]
    if len(beginning) not in (0, len(words)):
        raise DatasetError(
            f"next(iterator): expected all workers to be at the same step of one dataset; worker "
            f"{' and '.join(beginning)} begins an iterator, or has loaded a state, and others are "
            f"in the middle of one; call iter(), next() and load_state_dict() alike on every worker"
        )
    return words


def agree(exchange: Exchange, own: StepReport) -> list[StepReport]:
    """Tell the others; return the words of all workers if they fit together.

    Raises
    ------
    DatasetError
        They do not: on every worker alike, so that none takes the step.
    """
    words: list[StepReport] = _of_one_kind(exchange(own))
    for worker, word in enumerate(words):
        if word[:2] != words[0][:2]:
            raise DatasetError(
                f"next(iterator): expected all workers to be at the same step; worker 0 is at step "
                f"{words[0].step} of epoch {words[0].epoch}, worker {worker} at step {word.step} "
                f"of epoch {word.epoch}; call iter() and next() equally often on every worker, and "
                f"load the same state on all of them"
            )
    ended = [worker for worker, word in enumerate(words) if not word.has_batch]
    having = [word for word in words if word.has_batch]
    if ended and any(word.empty is None for word in having):
        raise DatasetError(
            f"distribute_datasets_from_function: worker {ended[0]} has no elements left while "
            f"others have, and elements that are no batches have no empty part; batch the "
            f"datasets, or make them equally long with take()"
        )
    return words
