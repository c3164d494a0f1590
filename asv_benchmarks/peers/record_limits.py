"""``python -m peers record-limits``: our all-reduces beside C, added to the history."""

from __future__ import annotations

import argparse
import datetime

from dvkernels.benchmarks import available_memory, c_probe, cases, measurement
from dvkernels.benchmarks.cases import Case
from dvkernels.benchmarks.stopwatch import Samples
from dvkernels.cli import argument_types, output_paths
from dvkernels.errors import AlgorithmError
from dvkernels.profiler import atomic_file
from dvkernels.profiler.core_usage import CoreUsage
from peers import limit_history, machine
from peers.limit_history import LimitRun

__all__: list[str] = []

HELP = "measure all-reduces as multiples of the time of C, and add them to the history"

MIB = 1 << 20
# Algorithm, replicas, bytes: the same in every run of the history.
CASES = [
    (algorithm, replicas, mib * MIB)
    for algorithm in ("direct", "ring")
    for replicas in (2, 4, 8)
    for mib in (1, 4, 16, 64)
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--runs",
        type=argument_types.positive,
        default=limit_history.WINDOW,
        help="runs, each of which is a line of the history; as many as check-limits needs",
    )
    parser.add_argument(
        "--rounds", type=argument_types.positive, default=11, help="alternating rounds of a run"
    )
    parser.add_argument(
        "--history", metavar="FILE", default=str(limit_history.FILE), help="file of the history"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure the runs, and write the history after each; return 1 if the machine was busy."""
    if reason := c_probe.reason_for_none():
        raise AlgorithmError(
            f"record-limits: needs a C compiler, with whose kernel ours is compared: {reason}"
        )
    path = output_paths.file("--history", arguments.history)
    history = limit_history.load(path)
    about = machine.about()
    is_busy = False
    for _ in range(arguments.runs):
        found = _measured(about["commit"], about["machine"], arguments.rounds)
        if found.others_share is not None and found.others_share > machine.BUSY:
            print(f"# not added: other programs took {found.others_share:.0%} of the cores")
            is_busy = True
            continue
        history.append(found)
        atomic_file.write_text(path, limit_history.text_of(history))
    return int(is_busy)


def _measured(commit: str, processor: str, rounds: int) -> LimitRun:
    """Measure all cases once; print a line for each."""
    usage = CoreUsage()
    times_of_c = {}
    for algorithm, replicas, nbytes in CASES:
        case = cases.case("all_reduce", nbytes, "float32", "mean", replicas, algorithm)
        name = f"{algorithm} {replicas} x {nbytes // MIB} MiB"
        if case.footprint > available_memory.available_nbytes() // 2:
            print(f"{name:18} left out: it needs {case.footprint // MIB} MiB of memory")
            continue
        times_of_c[name] = _times_of_c(case, rounds)
        middle, low, high = times_of_c[name]
        print(f"{name:18} {middle:.3f} times C ({low:.3f} to {high:.3f})", flush=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return LimitRun(
        commit,
        machine.commit_date(commit) or now,
        now,
        processor,
        c_probe.describe(),
        rounds,
        usage.share_of_others(),
        times_of_c,
    )


def _times_of_c(case: Case, rounds: int) -> list[float]:
    """Return median and quartiles of our time, as a multiple of C's in the same round."""
    found = measurement.measure(case, rounds, seed=0)
    if found.wrong or found.in_c is None:
        raise AssertionError(f"{case}: {found.wrong} wrong elements")
    pairs = zip(found.ours.seconds, found.in_c.seconds, strict=True)
    ratios = Samples(tuple(ours / in_c for ours, in_c in pairs))
    return [round(number, 4) for number in (ratios.median, *ratios.quartiles)]
