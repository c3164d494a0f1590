"""The workers that save and restore together: what one of them cannot do, none has done."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dvkernels.checkpoint.objects import variables_of
from dvkernels.checkpoint.storage import parallel_io
from dvkernels.communicators.base import Workers
from dvkernels.communicators.single import Single
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.replicas.rendezvous import StepEnded
from dvkernels.user_errors import in_words, shown

__all__: list[str] = []

CHIEF = 0
_ALONE = Single()


class _WorkerReport(NamedTuple):
    """What a worker tells the others when it has done its part."""

    said: Any = None
    failure: str | None = None
    is_damage: bool = False


def of(objects: Mapping[str, Any]) -> Workers:
    """Return the workers that the variables belong to; without such variables, this one alone."""
    owners = (variable.owner for variable in variables_of(objects).values())
    return next((owner.workers for owner in owners if owner.workers.size > 1), _ALONE)


def together(workers: Workers, what: str, act: Callable[[], Any]) -> list[Any]:
    """Do what may fail on each worker; return what ``act`` returned on each, which is small.

    Returns when all have done it. Raises on all of them if it failed on one: its own error there,
    elsewhere an error of the same kind that names it.
    """
    said, failure = None, None
    try:
        said = act()
    except Exception as error:
        failure = error
    except BaseException as error:  # an interrupt does not wait for the others
        workers.announce(error)
        raise
    is_damage = isinstance(failure, CheckpointDamagedError)
    own = (
        _WorkerReport(said)
        if failure is None
        else _WorkerReport(None, in_words(failure), is_damage)
    )
    with telling(workers, what):
        words: list[_WorkerReport] = workers.exchange(own)
    for worker, word in enumerate(words):
        if word.failure is None:
            continue
        # All raise the kind of the first, so that all of them go on alike.
        if failure is not None and word.is_damage == is_damage:
            raise failure
        kind = CheckpointDamagedError if word.is_damage else CheckpointError
        raise kind(f"{what}: worker {worker} of {workers.size} failed: {word.failure}") from failure
    return [word.said for word in words]


@contextlib.contextmanager
def telling(workers: Workers, what: str) -> Iterator[None]:
    """Let what fails here fail what the others wait for, or call next; and the other way round."""
    try:
        yield
    except StepEnded as error:
        raise CheckpointError(f"{what}: {error}") from error
    except BaseException as error:
        workers.announce(error)
        raise


def check_alike(workers: Workers, what: str, details: Mapping[str, str]) -> None:
    """Raise on all workers unless ``details``, words by path, is the same on all of them.

    A checksum of it is compared, and only where those differ do the words travel.
    """
    with telling(workers, what):
        if len(set(workers.exchange(parallel_io.checksum(json.dumps(details).encode())))) == 1:
            return
        each: list[Mapping[str, str]] = workers.exchange(details)
    for worker, theirs in enumerate(each):
        for path in [*each[0], *theirs]:
            mine, other = each[0].get(path, "nothing"), theirs.get(path, "nothing")
            if mine != other:
                raise CheckpointError(
                    f"{what}: expected the same on all workers; for {shown(path, 200)} worker 0 "
                    "has "
                    f"{mine}, worker {worker} {other}; build the objects alike everywhere, give a "
                    f"path where all workers see the same files, and keep what is a worker's own "
                    f"in a checkpoint of its own, without the variables of this strategy"
                )
    raise CheckpointError(f"{what}: expected the same order of the objects on all workers")
