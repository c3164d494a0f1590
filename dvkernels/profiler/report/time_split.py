"""Time split: the parts of the time of each replica's steps, which add up to the whole.

A step lasts from the end of the step before it on its worker to the end of its last replica. Its
parts for one replica:

    input          inside ``next`` of a distributed iterator
    between steps  the program between two steps, and the start of the replica's function
    compute        the replica's function without what follows
    waiting        for replicas that come to a collective, or end, later; for a thread to wake
    reduce         collectives while they are carried out, and reads of ON_READ variables
    update         optimizers' steps and writes of variables, with the reduction of their values

The first step is left out where there are several: it compiles, and starts threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dvkernels.profiler.report import arrivals
from dvkernels.profiler.report.arrivals import Meetings
from dvkernels.profiler.report.intervals import Intervals
from dvkernels.profiler.report.trace_table import TraceTable

__all__ = ["PARTS", "UPDATES", "ReplicaTime", "replica_times", "steps_of"]

PARTS = ("compute", "reduce", "update", "waiting", "input", "between steps")
UPDATES = ("apply_gradients", "Variable.")  # begins of the verbs that write variables


class ReplicaTime(NamedTuple):
    """Time of a replica's steps, by part [s]."""

    strategy: str
    worker: int
    replica: int
    num_steps: int
    seconds: dict[str, float]  # of all steps

    @property
    def total(self) -> float:
        """The time of all steps [s]."""
        return sum(self.seconds.values())

    def share(self, part: str) -> float:
        """Return the share of a part in the time."""
        return self.seconds[part] / max(self.total, 1e-12)


class Steps(NamedTuple):
    """Steps of a strategy on one worker, in order; and the runs of its replicas in them."""

    start: Any  # the end of the step before
    begin: Any
    end: Any
    runs: Any  # rows of the trace table
    of_run: Any  # the index of each run's step


def steps_of(table: TraceTable, worker: int, strategy: int) -> Steps:
    """Return the steps of a strategy, whose index in the texts is given, without nested ones."""
    is_run = table.is_a("name", "run") & table.is_a("category", "step") & (table.worker == worker)
    runs = np.flatnonzero(is_run & (table.strategy == strategy))
    # Strategies of one name, one after the other, count their steps anew.
    keys = table.replica[runs], table.step[runs]
    order, repetition = arrivals.ordinals(keys, table.begin[runs])
    runs = runs[order]
    numbers = np.stack([repetition, table.step[runs]])
    _, of_run = np.unique(numbers, axis=1, return_inverse=True)
    of_run = of_run.ravel()
    begin = np.full(of_run.max(initial=-1) + 1, np.inf)
    end = -begin
    np.minimum.at(begin, of_run, table.begin[runs])
    np.maximum.at(end, of_run, table.end[runs])
    by_time = np.argsort(begin, kind="stable")
    reach = np.append(-np.inf, np.maximum.accumulate(end[by_time]))[:-1]
    kept = by_time[begin[by_time] >= reach]
    ends = np.sort(table.end[is_run])  # of all strategies
    before = np.searchsorted(ends, begin[kept], side="right") - 1
    start = np.where(before >= 0, ends[before], begin[kept]) if len(kept) else begin
    if len(kept) > 1:
        kept, start = kept[1:], start[1:]
    index = np.full(len(begin), -1)
    index[kept] = np.arange(len(kept))
    is_kept = index[of_run] >= 0
    return Steps(start, begin[kept], end[kept], runs[is_kept], index[of_run][is_kept])


def replica_times(table: TraceTable, found: Meetings) -> list[ReplicaTime]:
    """Return the time of each replica, by part, of all strategies; the longest time first."""
    is_run = table.is_a("name", "run") & table.is_a("category", "step")
    pairs = np.unique(np.stack([table.worker[is_run], table.strategy[is_run]]), axis=1)
    waits = _Waits(table, found)
    times = [
        each
        for worker, strategy in pairs.T
        for each in _of_worker(table, waits, int(worker), int(strategy))
    ]
    longest = {each.strategy: 0.0 for each in times}
    for each in times:
        longest[each.strategy] = max(longest[each.strategy], each.total)
    return sorted(times, key=lambda t: (-longest[t.strategy], t.strategy, t.worker, t.replica))


class _Waits:
    """Spans of collectives: whose waiting ends when the last replica arrives."""

    def __init__(self, table: TraceTable, found: Meetings) -> None:
        begin = table.begin.copy()
        begin[found.rows] = np.maximum(begin[found.rows], found.last_begin)
        is_collective = table.is_a("category", "collective")
        self.is_reduce = is_collective & table.is_a("name", "reduce")
        self.is_call = is_collective & ~self.is_reduce
        self.all_there = begin  # when the last replica of the meeting had arrived
        is_update = np.char.startswith(table.verbs(), UPDATES[0])
        is_update |= np.char.startswith(table.verbs(), UPDATES[1])
        self.is_update = self.is_reduce & is_update


def _of_worker(
    table: TraceTable, waits: _Waits, worker: int, strategy: int
) -> Iterator[ReplicaTime]:
    here = table.worker == worker

    def spans(rows: Any) -> Intervals:
        return Intervals(table.begin[rows & here], table.end[rows & here])

    is_input, is_read, is_write = (
        table.is_a("category", name) for name in ("input", "read", "write")
    )
    inputs, reads, writes = spans(is_input), spans(is_read), spans(is_write)
    between = spans(is_input | is_read | is_write)  # what has a name between two steps
    updates = spans(waits.is_update | is_write)
    reduces = spans(waits.is_reduce & ~waits.is_update)
    steps = steps_of(table, worker, strategy)
    for replica in np.unique(table.replica[steps.runs]):
        is_own = table.replica[steps.runs] == replica
        runs, index = steps.runs[is_own], steps.of_run[is_own]
        begin, end = table.begin[runs], table.end[runs]
        own = here & np.isin(table.lane, np.unique(table.lane[runs]))
        calls = waits.is_call & own
        performed = Intervals(waits.all_there[calls], table.end[calls])
        in_calls, own_writes = spans(calls), spans(is_write & own)
        update, reduce = performed & updates, performed & reduces
        reducing = reduce.covered(begin, end) - (reduce & update).covered(begin, end)
        updating = update.covered(begin, end)
        waiting = in_calls.covered(begin, end) - reducing - updating
        updating += own_writes.covered(begin, end) - (own_writes & in_calls).covered(begin, end)
        start, last = steps.start[index], steps.end[index]  # of the step, before and after the run
        seconds = {
            "compute": end - begin - waiting - reducing - updating,
            "reduce": reducing + reads.covered(start, begin),
            "update": updating + writes.covered(start, begin),
            "waiting": waiting + last - end,
            "input": inputs.covered(start, begin),
            "between steps": begin - start - between.covered(start, begin),
        }
        yield ReplicaTime(
            table.texts[strategy], worker, int(replica), len(runs),
            {part: float(seconds[part].sum()) for part in PARTS},
        )  # fmt: skip
