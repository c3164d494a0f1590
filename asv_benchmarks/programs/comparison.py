"""Comparison of the ways to write a program: results, then times in alternating rounds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import threadpoolctl
from peers.machine import settle_allocator

from dvkernels.benchmarks.stopwatch import Samples, alternate
from dvkernels.errors import DvKernelsError, WorkerLostError
from dvkernels.profiler.core_usage import CoreUsage
from programs import other_processes
from programs.all_cores import AllCores
from programs.other_processes import Measured
from programs.program import ALL_CORES, OURS, Neighbour, Program

__all__ = ["Comparison", "DifferentResultError", "compare"]


class DifferentResultError(DvKernelsError, ArithmeticError):
    """Two ways to write a program have different results."""


class Comparison(NamedTuple):
    """Times of each way to write a program, and how far its result is from the first one's."""

    program: Program
    replicas: int
    samples: Mapping[str, Samples]
    differences: Mapping[str, float]
    skipped: Mapping[str, str]
    others_share: float | None

    def as_record(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values."""
        first = self.samples[self.program.neighbours[0].name]
        ours, possible = self.samples.get(OURS), self.samples.get(ALL_CORES)
        lines = {each.name: each.lines for each in self.program.neighbours}
        return {
            "program": self.program.name,
            "description": self.program.description.format(**self.program.sizes),
            "sizes": dict(self.program.sizes),
            "replicas": self.replicas,
            "unit": self.program.unit,
            "tolerance": self.program.tolerance,
            "ways": [
                {
                    "name": name,
                    "lines": lines.get(name),
                    "seconds": samples.median,
                    "quartiles": list(samples.quartiles),
                    "rounds": list(samples.seconds),
                    "times_ours": _of_rounds(samples, ours),
                    "difference": self.differences.get(name),
                }
                for name, samples in self.samples.items()
            ],
            "skipped": dict(self.skipped),
            "speed_up": _of_rounds(first, ours),
            "possible_speed_up": _of_rounds(first, possible),
            "of_possible": _of_rounds(possible, ours),
            "goals": [
                {"goal": goal.text, "value": value, "is_met": goal.is_met_by(value)}
                for goal in self.program.goals
                if {OURS, goal.beside} <= self.samples.keys()
                for value in [goal.value(self.samples)]
            ],
            "others_share": self.others_share,
        }


def _of_rounds(samples: Samples | None, reference: Samples | None) -> dict[str, Any] | None:
    """Return median and quartiles of the ratios of two times within each round."""
    if samples is None or reference is None:
        return None
    pairs = zip(samples.seconds, reference.seconds, strict=True)
    ratios = Samples(tuple(seconds / other for seconds, other in pairs))
    return {"median": ratios.median, "quartiles": list(ratios.quartiles)}


def compare(
    program: Program,
    replicas: int,
    num_rounds: int,
    cores: AllCores,
    pythons: Mapping[str, str] | None = None,
) -> Comparison:
    """Check that all ways have one result, then time them in turn.

    ``pythons`` has the interpreters of peers with an environment of their own.
    """
    replicas = program.replicas or replicas
    with contextlib.ExitStack() as stack:
        return _compare(program, replicas, num_rounds, cores, pythons or {}, stack)


def _compare(
    program: Program,
    replicas: int,
    num_rounds: int,
    cores: AllCores,
    pythons: Mapping[str, str],
    stack: contextlib.ExitStack,
) -> Comparison:
    settle_allocator()
    data = program.make(**program.sizes)
    skipped = {each.name: why for each in program.neighbours if (why := each.why_skipped(pythons))}
    chosen = [each for each in program.neighbours if each.name not in skipped]
    # Processes of peers live through all rounds: they take seconds to start, and sleep meanwhile.
    peers = {
        each.name: stack.enter_context(other_processes.started(each.peer, pythons, data, replicas))
        for each in chosen
        if each.peer
    }
    # Made once, after all libraries are loaded: it then sets their threads within microseconds.
    controller = threadpoolctl.ThreadpoolController()

    @contextlib.contextmanager
    def ready(neighbour: Neighbour) -> Any:
        if neighbour.write is None:
            yield peers[neighbour.name]
            return
        threads = replicas if neighbour.is_threaded_blas else 1
        write = contextlib.contextmanager(neighbour.write)
        with controller.limit(limits=threads, user_api="blas"), write(data, replicas) as run:
            yield run

    results = {}
    for neighbour in chosen:
        try:
            with ready(neighbour) as run:
                results[neighbour.name] = program.digest(_result_of(run()))
        except WorkerLostError as error:
            if neighbour.write is not None:
                raise
            skipped[neighbour.name] = str(error)
    chosen = [each for each in chosen if each.name in results]
    differences = _differences(program, results, {e.name for e in chosen if e.is_landmark})
    units = program.units(program.sizes)

    def timer_of(neighbour: Neighbour) -> Callable[[], float]:
        def timer() -> float:
            with ready(neighbour) as run:
                found = program.consume(run())  # starts threads, fills caches
                if isinstance(found, Measured):
                    return found.seconds / units
                started = time.perf_counter()
                program.consume(run())
                return (time.perf_counter() - started) / units

        return timer

    def all_cores() -> float:
        cores.seconds(program.name, program.sizes)  # makes the data, fills caches
        return cores.seconds(program.name, program.sizes) / units

    timers = {each.name: timer_of(each) for each in chosen}
    if program.share is not None:
        timers[ALL_CORES] = all_cores
    usage = CoreUsage()
    samples = alternate(timers, num_rounds)
    return Comparison(program, replicas, samples, differences, skipped, usage.share_of_others())


def _result_of(found: Any) -> Any:
    return found.result if isinstance(found, Measured) else found


def _differences(
    program: Program, results: Mapping[str, Any], landmarks: set[str]
) -> dict[str, float]:
    """Return the relative difference of each result to the first one; raise if it is too large."""
    first, *_ = results.values()
    length = float(np.linalg.norm(first)) or 1.0
    differences = {
        name: float(np.linalg.norm(result - first)) / length
        for name, result in results.items()
        if name not in landmarks
    }
    for name, difference in differences.items():
        if not difference <= program.tolerance:
            raise DifferentResultError(
                f"programs: {program.name}: the result of {name} differs from that of "
                f"{next(iter(results))} by {difference:.1e}, relatively; expected at most "
                f"{program.tolerance:g}: correct the program before measuring it"
            )
    return differences
