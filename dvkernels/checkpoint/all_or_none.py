"""Collective actions of the workers of a checkpoint, which succeed on all workers or on none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dvkernels.checkpoint.storage import parallel_io
from dvkernels.communicators.base import Workers
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.replicas.diagnostics import StepEnded
from dvkernels.user_errors import brief, context_manager, describe

__all__: list[str] = []

CHIEF = 0


class _WorkerReport(NamedTuple):
    """Outcome of an action on one worker, which all workers exchange."""

    result: Any = None
    failure: str | None = None
    is_damage: bool = False


def run(workers: Workers, what: str, act: Callable[[], Any]) -> list[Any]:
    """Call ``act`` on every worker; return its results, which should be small, of all workers.

    Returns when all workers have called it. If it raised on one worker, all workers raise: that
    one its own error, the others an error of the same class that names the worker.
    """
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    except BaseException as error:  # an interrupt does not wait for the other workers
        workers.announce(error)
        raise
    is_damage = isinstance(failure, CheckpointDamagedError)
    own = (
        _WorkerReport(result)
        if failure is None
        else _WorkerReport(None, describe(failure), is_damage)
    )
    with announcing_failures(workers, what):
        reports: list[_WorkerReport] = workers.exchange(own)
    for worker, report in enumerate(reports):
        if report.failure is None:
            continue
        # All raise the class of the first failure, so that all programs take the same branch.
        if failure is not None and report.is_damage == is_damage:
            raise failure
        kind = CheckpointDamagedError if report.is_damage else CheckpointError
        message = f"{what}: worker {worker} of {workers.size} failed: {report.failure}"
        raise kind(message) from failure
    return [report.result for report in reports]


@context_manager
def announcing_failures(workers: Workers, what: str) -> Iterator[None]:
    """Announce a failure here to the other workers, whose current or next call then fails.

    An announced failure of another worker is raised here as :class:`CheckpointError`.
    """
    try:
        yield
    except StepEnded as error:
        raise CheckpointError(f"{what}: {error}") from error
    except BaseException as error:
        workers.announce(error)
        raise


def check_consistent(workers: Workers, what: str, details: Mapping[str, str]) -> None:
    """Raise on all workers unless ``details``, descriptions by path, are the same on all of them.

    The workers exchange a checksum, and the descriptions themselves only where checksums differ.
    """
    with announcing_failures(workers, what):
        if len(set(workers.exchange(parallel_io.checksum(json.dumps(details).encode())))) == 1:
            return
        each: list[Mapping[str, str]] = workers.exchange(details)
    for worker, theirs in enumerate(each):
        for path in [*each[0], *theirs]:
            mine, other = each[0].get(path, "nothing"), theirs.get(path, "nothing")
            if mine != other:
                raise CheckpointError(
                    f"{what}: expected the same on all workers; for {brief(path, 200)} worker 0 "
                    f"has {mine}, worker {worker} {other}; build the same objects on all workers, "
                    f"give a path where all workers see the same files, and keep the objects of a "
                    f"single worker in another checkpoint, without variables of this strategy"
                )
    raise CheckpointError(f"{what}: expected the same order of the objects on all workers")
