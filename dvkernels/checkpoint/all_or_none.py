"""Collective actions of the workers of a checkpoint, which succeed on all workers or on none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dvkernels.checkpoint.storage import parallel_io
from dvkernels.communicators.base import Workers
from dvkernels.communicators.workers.atomic_commit import first_difference, results_of_all
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.replicas.diagnostics import StepEnded
from dvkernels.user_errors import brief, context_manager

__all__: list[str] = []

CHIEF = 0


def run(workers: Workers, what: str, act: Callable[[], Any]) -> list[Any]:
    """Call ``act`` on every worker; return its results, which should be small, of all workers.

    Returns when all workers have called it. If it raised on one worker, all workers raise: that
    one its own error, the others an error of the same class that names the worker.
    """

    def act_or_announce() -> Any:
        try:
            return act()
        except Exception:
            raise
        except BaseException as error:  # an interrupt does not wait for the other workers
            workers.announce(error)
            raise

    def exchange(outcome: Any) -> list[Any]:
        with announcing_failures(workers, what):
            return workers.exchange(outcome)

    return results_of_all(
        exchange,
        act_or_announce,
        (CheckpointDamagedError, CheckpointError),
        lambda worker, text: f"{what}: worker {worker} of {workers.size} failed: {text}",
    )


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
        difference = first_difference(workers.exchange(details), "nothing")
    if difference is None:
        raise CheckpointError(f"{what}: expected the same order of the objects on all workers")
    path, found = difference
    worker = next(k for k, other in enumerate(found) if other != found[0])
    raise CheckpointError(
        f"{what}: expected the same on all workers; for {brief(path, 200)} worker 0 has "
        f"{found[0]}, worker {worker} {found[worker]}; build the same objects on all workers, give "
        f"a path where all workers see the same files, and keep the objects of a single worker in "
        f"another checkpoint, without variables of this strategy"
    )
