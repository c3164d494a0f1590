"""Shuffled batches of rows in memory, as they come out of the pipeline."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import dvkernels as dv
from programs.program import OURS, Neighbour, Program, at_most
from programs.rows import SEED, Rows, make

__all__ = ["PROGRAM", "concatenated", "exhaust"]

Run = Iterator[Callable[[], Any]]


def fancy_index(rows: Rows, count: int) -> Run:
    """Index the arrays with the shuffled positions."""

    def program() -> Iterator[Any]:
        order = rows.order(0)
        for start in range(0, len(order), rows.size):
            chosen = order[start : start + rows.size]
            yield [(rows.x[chosen], rows.y[chosen])]

    yield program


def replicas(rows: Rows, count: int) -> Run:
    """Take the parts of the replicas; to ask for them makes sure that they are assembled."""
    with dv.MirroredStrategy(count) as strategy:
        dataset = dv.Dataset.from_arrays((rows.x, rows.y)).shuffle(seed=SEED).batch(rows.size)
        batches = strategy.distribute_dataset(dataset)

        def program() -> Iterator[Any]:
            for batch in batches:
                yield strategy.local_results(batch)

        yield program


def threads_by_hand(rows: Rows, count: int) -> Run:
    """Index the arrays in a pool of threads, each of which takes a part of the positions."""
    with ThreadPoolExecutor(count) as pool:

        def program() -> Iterator[Any]:
            order = rows.order(0)
            for start in range(0, len(order), rows.size):
                parts = np.array_split(order[start : start + rows.size], count)
                yield list(pool.map(lambda part: (rows.x[part], rows.y[part]), parts))

        yield program


def into_old_memory(rows: Rows, count: int) -> Run:
    """Take the rows into arrays that every batch uses again."""
    x, y = np.empty((rows.size, rows.x.shape[1])), np.empty(rows.size)

    def program() -> Iterator[Any]:
        order = rows.order(0)
        for start in range(0, len(order), rows.size):
            chosen = order[start : start + rows.size]
            np.take(rows.x, chosen, 0, out=x[: len(chosen)], mode="clip")
            np.take(rows.y, chosen, 0, out=y[: len(chosen)], mode="clip")
            yield [(x[: len(chosen)], y[: len(chosen)])]

    yield program


def share(rows: Rows, rank: int, count: int) -> None:
    """Take one part of each batch."""
    order = rows.order(0)
    for start in range(0, len(order), rows.size):
        part = np.array_split(order[start : start + rows.size], count)[rank]
        _ = rows.x[part], rows.y[part]


def exhaust(batches: Iterator[Any]) -> None:
    """Take all batches, and keep none."""
    deque(batches, maxlen=0)


def concatenated(batches: Iterator[Any]) -> Any:
    """Return all rows with their targets, in the order in which they came."""
    return np.concatenate([np.column_stack(part) for parts in batches for part in parts])


PROGRAM = Program(
    "batches",
    "{rows} rows of {columns} float64 and a target, shuffled, in batches of {size}",
    {"rows": 50_000, "columns": 100, "size": 5000},
    make,
    (
        Neighbour("fancy index", fancy_index),
        Neighbour(OURS, replicas),
        Neighbour("threads by hand", threads_by_hand),
        Neighbour("take into old memory", into_old_memory),
    ),
    "batch",
    lambda sizes: -(-sizes["rows"] // sizes["size"]),
    concatenated,
    0.0,
    (at_most(1.1, "threads by hand"),),
    share,
    exhaust,
)
