"""Arrivals: when each replica comes to a collective, and who makes the others wait.

The k-th collective of a replica in a step meets the k-th of every other one, over all workers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dvkernels.profiler.report.trace_table import TraceTable

__all__ = ["Lateness", "Meetings", "lateness", "meetings", "ordinals"]


class Meetings(NamedTuple):
    """Calls of collectives in which replicas wait for each other: columns of equal length.

    Calls of one meeting follow each other, the last to arrive at the end. Meetings in which a
    replica is missing are left out: their step failed, or is not whole in the trace.
    """

    rows: Any  # of the trace table
    number: Any  # of the meeting, ascending
    last_begin: Any  # when the last replica arrived


class Lateness(NamedTuple):
    """How often, and for how long, a replica made the others wait."""

    strategy: str
    replica: int
    num_meetings: int
    num_last: int  # meetings to which it came last
    waited_seconds: float  # mean wait of the other replicas for it, summed over its num_last
    worst_steps: float  # part of the steps in which it made the others wait longest


def ordinals(keys: tuple[Any, ...], begins: Any) -> tuple[Any, Any]:
    """Return the order of rows by keys, then by begin, and in this order each row's number.

    The numbers count the rows of equal keys, from 0.
    """
    order = np.lexsort((begins, *reversed(keys)))
    if not len(order):
        return order, order
    is_new = np.ones(len(order), bool)
    is_new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    starts = np.flatnonzero(is_new)
    lengths = np.diff(np.append(starts, len(order)))
    return order, np.arange(len(order)) - np.repeat(starts, lengths)


def meetings(table: TraceTable) -> Meetings:
    """Return the meetings of a trace."""
    is_call = table.is_a("category", "collective") & (table.replica >= 0)
    is_call &= ~(table.is_a("name", "reduce") | table.is_a("name", "wait"))
    rows = np.flatnonzero(is_call)
    strategy, step, replica = table.strategy[rows], table.step[rows], table.replica[rows]
    order, number = ordinals((strategy, step, replica), table.begin[rows])
    rows, strategy, step, replica = rows[order], strategy[order], step[order], replica[order]
    order = np.lexsort((table.begin[rows], number, step, strategy))
    rows, strategy, replica = rows[order], strategy[order], replica[order]
    keys = np.stack([strategy, step[order], number[order]])
    is_new = np.ones(len(rows), bool)
    is_new[1:] = np.any(keys[:, 1:] != keys[:, :-1], axis=0)
    starts = np.flatnonzero(is_new)
    sizes = np.diff(np.append(starts, len(rows)))
    expected = {code: len(np.unique(replica[strategy == code])) for code in np.unique(strategy)}
    is_whole = sizes == np.array([expected[code] for code in strategy[starts]], int)
    keep = np.repeat(is_whole, sizes)
    last = table.begin[rows[starts + sizes - 1]] if len(rows) else np.empty(0)
    numbers = np.repeat(np.arange(len(starts)), sizes)
    return Meetings(rows[keep], numbers[keep], np.repeat(last, sizes)[keep])


def lateness(table: TraceTable, found: Meetings) -> list[Lateness]:
    """Rank the replicas of each strategy of several: who makes the others wait longest, first."""
    ranking = []
    strategies = table.strategy[found.rows]
    for code in np.unique(strategies):
        of_strategy = strategies == code
        rows = found.rows[of_strategy]
        size = len(np.unique(table.replica[rows]))
        if size < 2:
            continue
        last_row = rows[size - 1 :: size]  # of each meeting
        waits = found.last_begin[of_strategy] - table.begin[rows]
        cost = waits.reshape(-1, size).sum(axis=1) / (size - 1)
        last = table.replica[last_row]
        _, step = np.unique(table.step[last_row], return_inverse=True)
        by_step = np.zeros((step.max() + 1, last.max() + 1))
        np.add.at(by_step, (step, last), cost)
        worst = by_step.argmax(axis=1)
        ranking += [
            Lateness(
                table.texts[code], int(replica), len(last), int((last == replica).sum()),
                float(cost[last == replica].sum()), float((worst == replica).mean()),
            )
            for replica in np.unique(table.replica[rows])
        ]  # fmt: skip
    return sorted(ranking, key=lambda each: -each.waited_seconds)
