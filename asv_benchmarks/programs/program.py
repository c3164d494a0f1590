"""A whole program, the ways to write it, and the goals of the one that uses this library."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dvkernels.benchmarks.stopwatch import Samples, ratio
from programs import other_processes

__all__ = [
    "ALL_CORES",
    "OURS",
    "Goal",
    "Neighbour",
    "Program",
    "at_most",
    "lines_of_code",
    "lines_of_source",
    "microseconds",
    "of_possible",
    "within_quartiles",
]

OURS = "dvkernels"
ALL_CORES = "all cores, no synchronization"
_OF_THE_STOPWATCH = ("def program(", "yield program")

# Given the data and the number of threads, yields a function that runs the program: what comes
# before the yield (threads, a strategy) is set up outside of the clock, what follows ends it.
Write = Callable[[Any, int], Iterator[Callable[[], Any]]]


class Neighbour(NamedTuple):
    """One way to write a program: a function of this process, or a peer in one of its own."""

    name: str
    write: Write | None = None
    is_threaded_blas: bool = False  # BLAS may use all threads; else one
    needs: str = ""  # what must be there, "module" or "module:name", or the neighbour is skipped
    is_landmark: bool = False  # other arithmetic: the result is not compared
    calls: tuple[Callable[..., Any], ...] = ()  # functions that this neighbour alone needs
    peer: str = ""  # instead of ``write``: one of programs.other_processes.PEERS

    @property
    def lines(self) -> int:
        """The lines of code that this neighbour needs beside what all of them share."""
        if self.write is None:
            return other_processes.lines_of(self.peer, lines_of_source)
        return lines_of_code(self.write) + sum(lines_of_code(called) for called in self.calls)

    def why_skipped(self, pythons: Mapping[str, str]) -> str | None:
        """Return why this neighbour cannot be measured here, None if it can.

        ``pythons`` has the interpreters of peers with an environment of their own.
        """
        if self.write is None:
            return other_processes.why_skipped(self.peer, pythons)
        try:
            if self.needs:
                pkgutil.resolve_name(self.needs)
        except ImportError as error:
            return f"{error.name} is not installed"
        except AttributeError:
            return f"there is no {self.needs.partition(':')[2]} yet"
        return None


class Goal(NamedTuple):
    """A goal for the program that uses this library."""

    text: str
    limit: float
    value: Callable[[Mapping[str, Samples]], float]
    beside: str = OURS  # the implementation that the value compares with
    is_lower_limit: bool = False

    def is_met_by(self, value: float) -> bool:
        """Say whether a value meets the goal."""
        return value >= self.limit if self.is_lower_limit else value <= self.limit


class Program(NamedTuple):
    """A whole program: its data, and the ways to write it; the first one is plain NumPy."""

    name: str
    description: str  # with the sizes in braces
    sizes: Mapping[str, int]
    make: Callable[..., Any]  # sizes -> data, the same in every process
    neighbours: tuple[Neighbour, ...]
    unit: str  # what the seconds are of
    units: Callable[[Mapping[str, int]], int]  # sizes -> how many of them are in a run
    digest: Callable[[Any], Any]  # the result, as one array to compare
    tolerance: float  # of the relative difference to the first neighbour's result
    goals: tuple[Goal, ...] = ()
    # The compute of one of several threads, without synchronization: data, rank, count.
    share: Callable[[Any, int, int], object] | None = None
    consume: Callable[[Any], object] = lambda result: result  # what the clock covers beside the run
    replicas: int | None = None  # None: as many as the command is told
    needs: tuple[str, ...] = ()  # packages without which there are no data


def of_possible(limit: float) -> Goal:
    """Return the goal of a speed-up of at least ``limit`` times the possible one."""
    return Goal(
        f"at least {limit:g} of possible",
        limit,
        lambda found: ratio(found[ALL_CORES], found[OURS]),
        ALL_CORES,
        is_lower_limit=True,
    )


def at_most(limit: float, name: str) -> Goal:
    """Return the goal of at most ``limit`` times a neighbour's time."""
    text = f"at most {limit:g} times {name}"
    return Goal(text, limit, lambda found: ratio(found[OURS], found[name]), name)


def within_quartiles(name: str) -> Goal:
    """Return the goal of a lower quartile that is not above a neighbour's upper one."""

    def value(found: Mapping[str, Samples]) -> float:
        return found[OURS].quartiles[0] / found[name].quartiles[1]

    return Goal(f"lower quartile at most the upper one of {name}", 1.0, value, name)


def microseconds(limit: float) -> Goal:
    """Return the goal of a median time."""
    return Goal(f"at most {limit:g} us", limit, lambda found: found[OURS].median * 1e6)


def lines_of_code(function: Callable[..., Any]) -> int:
    """Count the lines that a user writes.

    Comments, blank lines and the docstring do not count, nor do the lines that serve the stopwatch:
    the ``def`` of the function, ``def program()`` and ``yield program``.
    """
    return lines_of_source(textwrap.dedent(inspect.getsource(function)), function.__name__)


def lines_of_source(source: str, name: str) -> int:
    """Count the lines of a function in a source, as :func:`lines_of_code`."""
    functions = (each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef))
    parsed = next(each for each in functions if each.name == name)
    body = parsed.body[1:] if ast.get_docstring(parsed) else parsed.body
    lines = source.splitlines()[body[0].lineno - 1 : parsed.end_lineno]
    stripped = (line.split("#")[0].strip() for line in lines)
    return sum(bool(line) and not line.startswith(_OF_THE_STOPWATCH) for line in stripped)
