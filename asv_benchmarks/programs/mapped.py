"""Ways to apply a function to many items: this library's ``map``, and what one would write else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import dvkernels as dv
from programs.program import OURS, Neighbour, Write, within_quartiles

__all__ = ["GOALS", "Work", "neighbours", "share"]

Run = Iterator[Callable[[], Any]]


class Work(NamedTuple):
    """A function, and its arguments."""

    function: Callable[[Any], Any]
    items: Sequence[Any]
    data: Any = None  # for the neighbours that do not call the function


def loop(work: Work, count: int) -> Run:
    """Apply the function in a loop."""
    yield lambda: [work.function(item) for item in work.items]


def replicas(work: Work, count: int) -> Run:
    """Apply the function on replicas of this library."""
    with dv.MirroredStrategy(count) as strategy:
        yield lambda: list(strategy.map(work.function, work.items))


def executor(work: Work, count: int) -> Run:
    """Apply the function in the threads of the standard library."""
    with ThreadPoolExecutor(count) as pool:
        yield lambda: list(pool.map(work.function, work.items))


def joblib_threads(work: Work, count: int) -> Run:
    """Apply the function in joblib's threads."""
    from joblib import Parallel, delayed

    with Parallel(count, prefer="threads") as parallel:
        yield lambda: parallel(delayed(work.function)(item) for item in work.items)


def neighbours(prange: Write | None = None, compiled: Any = None) -> tuple[Neighbour, ...]:
    """Return the neighbours of a program that maps.

    One that Numba can compile as a whole has a loop over ``prange`` in the function ``compiled``.
    """
    return (
        Neighbour("loop", loop),
        Neighbour(OURS, replicas, needs="dvkernels:MirroredStrategy.map"),
        Neighbour("ThreadPoolExecutor", executor),
        Neighbour("joblib, threads", joblib_threads, needs="joblib"),
        *([Neighbour("prange", prange, calls=(compiled.py_func,))] if prange else []),
    )


def share(work: Work, rank: int, count: int) -> list[Any]:
    """Apply the function to every ``count``-th item; keep the results, as the program does."""
    return [work.function(item) for item in work.items[rank::count]]


GOALS = (within_quartiles("ThreadPoolExecutor"),)
