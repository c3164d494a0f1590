"""Advice: rules that name a problem of a traced program, and the setting to change.

Each rule looks for one problem, in shares of the time rather than in times, so that a busy machine
changes little. A program without these problems gets no advice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dvkernels.profiler.report.arrivals import Lateness
from dvkernels.profiler.report.time_split import ReplicaTime
from dvkernels.profiler.report.trace_table import TraceTable, WorkerFacts

__all__ = ["Advice", "advice"]

_FEWEST_STEPS = 5  # of a strategy, for which anything is said
_INPUT_SHARE = 0.25
_LATE_SHARE = 0.15  # of the time, that the others wait for one replica
_LATE_PART = 0.7  # of all waiting, and of the steps, that one replica causes
_COMPUTE_PART = 0.5  # of the waiting, that its longer compute explains
# A step of two replicas with a collective costs 50 us, of eight 350 (explanation/overhead.md).
_TINY_SECONDS = 300e-6  # of compute in a step
_TINY_SHARE = 0.5  # of the time, that starting, meeting and waiting take
_LIBRARY_SHARE = 0.1  # of the processor time, and of a core's, that threads of libraries take
_BUSY_PART = 0.25  # of the busiest thread's processor time, from which on another one is busy
_READ_SHARE = 0.01


class Advice(NamedTuple):
    """A problem, and the setting to change."""

    problem: str  # a short name of the rule
    sentence: str
    change: str
    page: str  # of the documentation


def advice(
    table: TraceTable, times: Sequence[ReplicaTime], ranking: Sequence[Lateness]
) -> list[Advice]:
    """Return what to change, most of all in the strategy whose steps took the longest."""
    found: list[Advice] = []
    # Those whose steps take a tenth of the longest's time, or more, are worth a sentence.
    longest = max((each.total for each in times), default=0.0)
    for name in dict.fromkeys(each.strategy for each in times if each.total >= longest / 10):
        replicas = [each for each in times if each.strategy == name]
        if min(each.num_steps for each in replicas) < _FEWEST_STEPS:
            continue
        found += _input_bound(replicas)
        # Both make replicas late by themselves.
        causes = [*_oversubscribed(table, replicas), *_tiny_steps(replicas)]
        found += causes or _late_replica(replicas, ranking)
        found += _read_every_step(table, replicas)
    return list({each.problem + each.sentence: each for each in found}.values())


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _mean_share(replicas: Sequence[ReplicaTime], *parts: str) -> float:
    return float(np.mean([sum(map(each.share, parts)) for each in replicas]))


def _input_bound(replicas: Sequence[ReplicaTime]) -> Iterator[Advice]:
    share = _mean_share(replicas, "input")
    if share >= _INPUT_SHARE:
        yield Advice(
            "input",
            f"Input sets the pace: {_percent(share)} of the time went into waiting for the next "
            f"batch. If data cost nothing, the steps would be {1 / max(1e-3, 1 - share):.1f} times "
            f"as fast.",
            "Keep batches ready with dv.InputOptions(prefetch=2), and share slow reading or "
            "decoding with Dataset.map(fn, num_workers=...).",
            "how-to/feed-the-replicas",
        )


def _tiny_steps(replicas: Sequence[ReplicaTime]) -> Iterator[Advice]:
    compute = max(each.seconds["compute"] / each.num_steps for each in replicas)
    share = _mean_share(replicas, "waiting", "between steps")
    if len(replicas) > 1 and compute < _TINY_SECONDS and share >= _TINY_SHARE:
        yield Advice(
            "tiny steps",
            f"The steps are tiny: a replica computes for {1e6 * compute:.0f} us in a step, and "
            f"{_percent(share)} of the time goes into starting the replicas and waiting for them.",
            "Give each step more work: a larger Dataset.batch(size), or several batches in one "
            "call of strategy.run.",
            "explanation/overhead",
        )


def _late_replica(replicas: Sequence[ReplicaTime], ranking: Sequence[Lateness]) -> Iterator[Advice]:
    of_job = [each for each in ranking if each.strategy == replicas[0].strategy]
    total = float(np.mean([each.total for each in replicas]))
    waited = sum(each.waited_seconds for each in of_job)
    compute = {each.replica: each.seconds["compute"] for each in replicas}
    for each in of_job[:1]:
        share = each.waited_seconds / total
        is_the_one = each.waited_seconds >= _LATE_PART * waited and each.worst_steps >= _LATE_PART
        own = compute.pop(each.replica, 0.0)
        longer = own - float(np.mean([*compute.values()]))
        if share >= _LATE_SHARE and is_the_one and longer >= _COMPUTE_PART * each.waited_seconds:
            yield Advice(
                "late replica",
                f"Replica {each.replica} is late: the others waited for it {_percent(share)} of "
                f"the time, and in {_percent(each.worst_steps)} of the steps longest.",
                'Divide the batches by measured speed with dv.InputOptions(balance="measured"), or '
                "find what only this replica does, with dv.profiler.range.",
                "how-to/uneven-work",
            )


def _oversubscribed(table: TraceTable, replicas: Sequence[ReplicaTime]) -> Iterator[Advice]:
    """Compare replicas and busy threads of libraries with the cores, on each host."""
    by_host: dict[str, list[WorkerFacts]] = {}
    for facts in table.workers:
        by_host.setdefault(facts.host, []).append(facts)
    for found in by_host.values():
        workers = {facts.worker for facts in found}
        num_replicas = sum(each.worker in workers for each in replicas)
        cores = max(facts.cores or num_replicas for facts in found)
        python = sum(sum(facts.thread_seconds) for facts in found)
        libraries = sum(sum(facts.library_thread_seconds) for facts in found)
        busy = sum(
            took > _BUSY_PART * max(facts.thread_seconds, default=0.0)
            for facts in found
            for took in facts.library_thread_seconds
        )
        share = libraries / max(1e-9, python + libraries)
        of_core = libraries / max(1e-9, max(each.total for each in replicas))
        is_much = min(share, of_core) >= _LIBRARY_SHARE
        if num_replicas > 1 and is_much and num_replicas + busy > cores:
            yield Advice(
                "oversubscribed cores",
                f"The cores are oversubscribed: {num_replicas} replicas and {busy} threads of "
                f"BLAS, OpenMP or Numba compete for {cores}; these threads took {_percent(share)} "
                f"of the processor time.",
                'Leave the strategy\'s threads="share", which is the default, with the extra '
                "dvkernels[threads], or set OMP_NUM_THREADS=1 before Python starts.",
                "how-to/share-the-cores",
            )


def _read_every_step(table: TraceTable, replicas: Sequence[ReplicaTime]) -> Iterator[Advice]:
    steps = max(each.num_steps for each in replicas)
    worker = replicas[0].worker
    rows = np.flatnonzero(table.is_a("category", "read") & (table.worker == worker))
    by_variable: dict[str, list[float]] = {}
    for row in rows:
        for name in table.variables.get(int(row), []):
            by_variable.setdefault(name, []).append(float(table.duration[row]))
    for name, seconds in by_variable.items():
        share = sum(seconds) / max(1e-9, replicas[0].total)
        if len(seconds) >= steps / 2 and share >= _READ_SHARE:
            yield Advice(
                "read every step",
                f"The ON_READ variable {name!r} is read {len(seconds)} times in {steps} steps: "
                f"each read aggregates the copies of all replicas, {_percent(share)} of the time.",
                "Read it once an epoch, or every hundred steps.",
                "how-to/custom-synchronization",
            )
