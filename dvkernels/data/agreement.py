"""What workers tell each other at each step, so that all of them take it or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dvkernels import user_errors
from dvkernels.errors import DatasetError

__all__ = ["Exchange", "Word", "agree", "report"]

# Given a small object, returns those of all workers, in their order.
Exchange = Callable[[Any], list[Any]]


class Word(NamedTuple):
    """What a worker tells the others about its step."""

    epoch: int = 0
    step: int = 0  # of the epoch; 0 where workers count elements of their own
    has_batch: bool = False
    progress: Any = None  # of this worker: {lane: position}, or the state of its own dataset
    empty: Any = None  # an element without rows, for those that have none left
    pipeline: tuple[str, ...] = ()  # of a dataset that should be the same on all workers
    failure: str | None = None


def report(exchange: Exchange, error: Exception) -> None:
    """Tell the others that this worker has failed; :func:`agree` raises there."""
    exchange(Word(failure=user_errors.in_words(error)))


def agree(exchange: Exchange, own: Word) -> list[Word]:
    """Tell the others; return the words of all workers if they fit together.

    Raises
    ------
    DatasetError
        They do not: on every worker alike, so that none takes the step.
    """
    words: list[Word] = exchange(own)
    for worker, word in enumerate(words):
        if word.failure is not None:
            raise DatasetError(
                f"worker {worker} could not read its batch: {word.failure}; no worker has "
                f"taken the step, and next() tries it again"
            )
        if word[:2] != words[0][:2]:
            raise DatasetError(
                f"next(iterator): expected all workers to be at the same step; worker 0 is at step "
                f"{words[0].step} of epoch {words[0].epoch}, worker {worker} at step {word.step} "
                f"of epoch {word.epoch}; call iter() and next() equally often on every worker, and "
                f"load the same state on all of them"
            )
        if word.pipeline != words[0].pipeline:
            raise DatasetError(
                f"distribute_dataset: expected every worker to read the same files in the same "
                f"order; got {'.'.join(words[0].pipeline)} on worker 0 and "
                f"{'.'.join(word.pipeline)} on worker {worker}; build the dataset alike everywhere "
                f"and sort the paths: machines list a folder in different orders"
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
