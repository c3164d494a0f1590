"""The step: what a call costs beside the computation of a user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

import dvkernels as dv
from programs.batches import exhaust
from programs.program import OURS, Neighbour, Program, microseconds

__all__ = ["PROGRAMS"]

Run = Iterator[Callable[[], Any]]
_MOST_REPLICAS = 256


class Calls(NamedTuple):
    """How many calls, and an array for each replica or the rows of batches."""

    number: int
    arrays: Any


def make(calls: int, length: int = 0) -> Calls:
    """Draw an array for each replica."""
    rng = np.random.default_rng(6)
    return Calls(calls, rng.standard_normal((_MOST_REPLICAS, length), np.float32))


def make_rows(calls: int, rows: int, columns: int) -> Calls:
    """Draw the rows of as many batches as there are calls."""
    rng = np.random.default_rng(7)
    return Calls(calls, rng.standard_normal((calls * rows, columns), np.float32))


def _nothing(replica_id: int = 0) -> None:
    """Do nothing."""


def _run_nothing(calls: Calls, count: int) -> Run:
    with dv.MirroredStrategy(count) as strategy:
        yield lambda: [strategy.run(_nothing) for _ in range(calls.number)]


def _submit_nothing(calls: Calls, count: int) -> Run:
    with ThreadPoolExecutor(count) as pool:
        yield lambda: [[*pool.map(_nothing, range(count))].pop() for _ in range(calls.number)]


def _run_a_sum(calls: Calls, count: int) -> Run:
    with dv.MirroredStrategy(count) as strategy:

        def step() -> Any:
            context: Any = dv.get_replica_context()
            return context.all_reduce("sum", calls.arrays[context.replica_id_in_sync_group])

        yield lambda: [strategy.run(step) for _ in range(calls.number)][-1].values[-1]


def _submit_a_sum(calls: Calls, count: int) -> Run:
    def step(rank: int) -> Any:
        return calls.arrays[rank]

    with ThreadPoolExecutor(count) as pool:
        yield lambda: [sum(pool.map(step, range(count))) for _ in range(calls.number)][-1]


def _next_of_replicas(calls: Calls, count: int) -> Run:
    size = len(calls.arrays) // calls.number
    with dv.MirroredStrategy(count) as strategy:
        batches = strategy.distribute_dataset(dv.Dataset.from_arrays(calls.arrays).batch(size))
        yield lambda: iter(batches)


def _slices(calls: Calls, count: int) -> Run:
    rows, size = calls.arrays, len(calls.arrays) // calls.number
    part = -(-size // count)

    def program() -> Iterator[Any]:
        for start in range(0, len(rows), size):
            yield [rows[k : min(k + part, start + size)] for k in range(start, start + size, part)]

    yield program


def _is_none(results: Any) -> Any:
    """Return 1 for each call without a result."""
    return np.array([result is None for result in results], float)


def _rows_of(batches: Iterator[Any]) -> Any:
    return np.concatenate([np.concatenate(getattr(parts, "values", parts)) for parts in batches])


def _number_of_calls(sizes: Mapping[str, int]) -> int:
    return sizes["calls"]


PROGRAMS = (
    Program(
        "empty-step",
        "run of nothing",
        {"calls": 1000},
        make,
        (Neighbour("ThreadPoolExecutor", _submit_nothing), Neighbour(OURS, _run_nothing)),
        "call",
        _number_of_calls,
        _is_none,
        0.0,
        (microseconds(20),),
    ),
    Program(
        "empty-step-8",
        "run of nothing on 8 replicas, whatever the number of cores",
        {"calls": 300},
        make,
        (Neighbour("ThreadPoolExecutor", _submit_nothing), Neighbour(OURS, _run_nothing)),
        "call",
        _number_of_calls,
        _is_none,
        0.0,
        (microseconds(150),),
        replicas=8,
    ),
    Program(
        "small-step",
        "run of a step that all-reduces {length} float32",
        {"calls": 1000, "length": 1024},
        make,
        (Neighbour("ThreadPoolExecutor, sum", _submit_a_sum), Neighbour(OURS, _run_a_sum)),
        "call",
        _number_of_calls,
        np.asarray,
        1e-6,
        (microseconds(45),),
    ),
    Program(
        "next-batch",
        "next batch of {rows} x {columns} float32, in order",
        {"calls": 1000, "rows": 64, "columns": 64},
        make_rows,
        (Neighbour("slices", _slices), Neighbour(OURS, _next_of_replicas)),
        "batch",
        _number_of_calls,
        _rows_of,
        0.0,
        (microseconds(5),),
        consume=exhaust,
    ),
)
