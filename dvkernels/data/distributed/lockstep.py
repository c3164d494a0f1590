"""Lockstep of the workers: before the first step, and where needed at each, they compare reports.

Either all workers take a step, or none does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dvkernels import user_errors
from dvkernels.data.node import Length
from dvkernels.errors import DatasetError

__all__: list[str] = []

# All-gather of a small object: returns the objects of all workers, in order.
Exchange = Callable[[Any], list[Any]]


class StartReport(NamedTuple):
    """Report of a worker before its first step: what it is about to read, and from where."""

    pipeline: tuple[str, ...]
    length: Length
    epoch: int
    position: int
    fingerprint: str | None = None


class StepReport(NamedTuple):
    """Report of a worker about its step."""

    epoch: int = 0
    step: int = 0  # in the epoch; 0 where the workers have datasets of their own
    has_batch: bool = False
    progress: Any = None  # of this worker: {lane: position}, or the state of its own dataset
    empty: Any = None  # an element without rows, for the workers that have none left
    failure: str | None = None


def report_failure(exchange: Exchange, error: Exception) -> None:
    """Report to the other workers that this one failed; :func:`agree_on_step` raises there."""
    exchange(StepReport(failure=user_errors.describe(error)))


def agree_on_start(exchange: Exchange, own: StartReport) -> None:
    """Check that all workers are about to read the same data from the same position.

    Raises
    ------
    DatasetError
        They are not. Raised on every worker, so that none takes a step.
    """
    starts: list[StartReport] = _check_kinds(exchange(own))
    for name, remedy in _REMEDIES.items():
        found = [getattr(start, name) for start in starts]
        if all(value == found[0] for value in found):
            continue
        if name == "pipeline":
            name, found = _first_difference(found)
        raise DatasetError(
            f"next(iterator): expected one dataset, at one position, on all workers; its {name} is "
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
    """Return the name of the first link that differs, and the link on each worker."""
    links = itertools.zip_longest(*pipelines, fillvalue="missing")
    index, found = next(
        (index, list(link)) for index, link in enumerate(links) if len(set(link)) > 1
    )
    return f"link {index}", found


def _by_worker(found: Sequence[Any]) -> str:
    """Return a text of the values by worker: ``3 on workers 0 and 2, 4 on worker 1``."""
    holders: dict[Any, list[str]] = {}
    for worker, value in enumerate(found):
        holders.setdefault(value, []).append(str(worker))
    return ", ".join(
        f"{value} on worker{'s' * (len(workers) > 1)} {' and '.join(workers)}"
        for value, workers in holders.items()
    )


def _check_kinds(reports: list[Any]) -> list[Any]:
    """Return the reports; raise if a worker failed, or if their kinds differ."""
    for worker, report in enumerate(reports):
        if isinstance(report, StepReport) and report.failure is not None:
            raise DatasetError(
                f"worker {worker} could not read its batch: {report.failure}; no worker has "
                f"taken the step, and next() tries it again"
            )
    beginning = [
        str(worker) for worker, report in enumerate(reports) if isinstance(report, StartReport)
    ]
    if len(beginning) not in (0, len(reports)):
        raise DatasetError(
            f"next(iterator): expected all workers to be at the same step of one dataset; worker "
            f"{' and '.join(beginning)} begins an iterator, or has loaded a state, and others are "
            f"in the middle of one; call iter(), next() and load_state_dict() alike on every worker"
        )
    return reports


def agree_on_step(exchange: Exchange, own: StepReport) -> list[StepReport]:
    """Exchange the reports of a step, and return those of all workers if they are consistent.

    Raises
    ------
    DatasetError
        They are not. Raised on every worker, so that none takes the step.
    """
    reports: list[StepReport] = _check_kinds(exchange(own))
    for worker, report in enumerate(reports):
        if report[:2] != reports[0][:2]:
            raise DatasetError(
                f"next(iterator): expected all workers to be at the same step; worker 0 is at step "
                f"{reports[0].step} of epoch {reports[0].epoch}, worker {worker} at step "
                f"{report.step} of epoch {report.epoch}; call iter() and next() equally often on "
                f"every worker, and load the same state on all of them"
            )
    ended = [worker for worker, report in enumerate(reports) if not report.has_batch]
    having = [report for report in reports if report.has_batch]
    if ended and any(report.empty is None for report in having):
        raise DatasetError(
            f"distribute_datasets_from_function: worker {ended[0]} has no elements left while "
            f"others have, and elements that are no batches have no empty part; batch the "
            f"datasets, or make them equally long with take()"
        )
    return reports
