"""Lockstep of the workers: before the first step, and where needed at each, they compare reports.

Either all workers take a step, or none does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dvkernels.communicators.workers.atomic_commit import Exchange, first_difference, results_of_all
from dvkernels.data.node import Length
from dvkernels.errors import DatasetError

__all__: list[str] = []


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


def agree_on_start(exchange: Exchange, own: StartReport) -> None:
    """Check that all workers are about to read the same data from the same position.

    Raises
    ------
    DatasetError
        They are not. Raised on every worker, so that none takes a step.
    """
    starts: list[StartReport] = _reports_of_all(exchange, lambda: own)
    pipelines = [{f"link {k}": link for k, link in enumerate(s.pipeline)} for s in starts]
    rest = [
        {name: value for name, value in s._asdict().items() if name in _REMEDIES} for s in starts
    ]
    difference = first_difference(pipelines, "missing") or first_difference(rest, None)
    if difference is not None:
        name, found = difference
        remedy = _REMEDIES.get(name, _PIPELINE_REMEDY)
        raise DatasetError(
            f"next(iterator): expected one dataset, at one position, on all workers; its {name} is "
            f"{_by_worker(found)}; {remedy}. No worker has taken the step"
        )


_PIPELINE_REMEDY = (
    "build the dataset alike everywhere, with the same numbers, and sort the paths: machines list "
    "a folder in different orders. A dataset of its own for each worker is what "
    "distribute_datasets_from_function is for"
)
_REMEDIES = {
    "length": "build the dataset alike everywhere, of the same data",
    "epoch": "call iter() equally often on every worker, or choose the epoch with set_epoch",
    "position": "load the same state on every worker",
    "fingerprint": "the data differ, or their order does: read the same data everywhere, and sort "
    "what a folder or a set lists",
}


def _by_worker(found: Sequence[Any]) -> str:
    """Return a text of the values by worker: ``3 on workers 0 and 2, 4 on worker 1``."""
    holders: dict[Any, list[str]] = {}
    for worker, value in enumerate(found):
        holders.setdefault(value, []).append(str(worker))
    return ", ".join(
        f"{value} on worker{'s' * (len(workers) > 1)} {' and '.join(workers)}"
        for value, workers in holders.items()
    )


def _reports_of_all(exchange: Exchange, report: Callable[[], Any]) -> list[Any]:
    """Return the reports of all workers; raise if a worker failed, or if their kinds differ."""
    reports = results_of_all(
        exchange,
        report,
        (DatasetError,),
        lambda worker, text: (
            f"worker {worker} could not read its batch: {text}; no worker has taken the step, and "
            f"next() tries it again"
        ),
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


def agree_on_step(exchange: Exchange, take: Callable[[], StepReport]) -> list[StepReport]:
    """Take this worker's step, and return the reports of all workers if they are consistent.

    Raises
    ------
    DatasetError
        They are not, or a worker failed. Raised on every worker, so that none takes the step; a
        worker that failed raises its own error.
    """
    reports: list[StepReport] = _reports_of_all(exchange, take)
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
