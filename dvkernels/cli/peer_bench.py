"""What the benchmarks of one part of the library beside others have in common."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dvkernels._version import __version__
from dvkernels.benchmarks.peers import registry
from dvkernels.benchmarks.peers.registry import Peer
from dvkernels.benchmarks.peers.worker import Worker, end_all
from dvkernels.benchmarks.stopwatch import Samples, ratio
from dvkernels.cli import argument_types, output_paths
from dvkernels.devices import cpu
from dvkernels.errors import AlgorithmError, WorkerLostError
from dvkernels.profiler import atomic_file

__all__: list[str] = []

# Given a case, a folder and the peers' workers, returns the seconds of each contestant; ours are
# called dvkernels.
Measure = Callable[[str, str, Mapping[str, Worker]], Mapping[str, Samples]]


class PeerBench(NamedTuple):
    """What is measured, and beside whom."""

    command: str
    cases: Mapping[str, str]  # what each is
    peers: Mapping[str, Peer]
    measure: Measure
    unit: str  # what the seconds are for: "a batch"
    folder: str | None = None  # in which a temporary one is made
    num_ranks: int = 2  # processes of each peer


def add_arguments(parser: argparse.ArgumentParser, peers: str) -> None:
    """Declare the options."""
    parser.add_argument(
        "--rounds", type=argument_types.integer, default=7, help="alternating rounds"
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help=f"measure a peer ({peers}) with the interpreter that has it",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there as JSON")


def run(contest: PeerBench, arguments: argparse.Namespace) -> int:
    """Measure all cases, and print a line for each contestant."""
    if arguments.rounds < 1:
        raise AlgorithmError(
            f"{contest.command}: expected --rounds of at least 1, got {arguments.rounds}"
        )
    if arguments.json is not None:
        output_paths.file("--json", arguments.json)
    if contest.folder is not None:
        output_paths.folder("--folder", contest.folder)
    workers: dict[str, Worker] = {}
    versions: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        started: list[Worker] = []
        stack.callback(end_all, started)
        pythons = registry.interpreters(contest.command, arguments.peer_python, contest.peers)
        for name, python in pythons.items():
            version = registry.version_of(contest.peers[name], python)
            if version is None:
                print(f"# {name} skipped: {contest.peers[name].how_to_get}")
                continue
            versions[name] = version
            workers[name] = Worker(name, python, contest.num_ranks, peers=contest.peers)
            started.append(workers[name])
        about = {
            "dvkernels": __version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{cpu.usable_cores()} usable cores, {platform.system()} "
            f"{platform.machine()}, Python {platform.python_version()}",
            "peers": versions,
            "rounds": arguments.rounds,
        }
        print("# " + ", ".join(f"{key}: {value}" for key, value in about.items()))
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=contest.folder))
        for case, what in contest.cases.items():
            print(f"# {case}: {what}")
            try:
                found = contest.measure(case, folder, workers)
            except WorkerLostError as error:
                print(f"# {error}")
                return 1
            records += [_record(case, name, found, contest.unit) for name in found]
    if arguments.json:
        atomic_file.write_text(arguments.json, json.dumps({**about, "results": records}, indent=1))
    return 0


def _record(case: str, name: str, found: Mapping[str, Samples], unit: str) -> dict[str, Any]:
    """Print what one contestant took, and return it."""
    samples = found[name]
    low, high = samples.quartiles
    times = ratio(samples, found["dvkernels"])
    print(
        f"{name:13} {1e6 * samples.median:12.1f} us {unit} "
        f"({1e6 * low:.1f} to {1e6 * high:.1f}), {times:6.2f} times ours"
    )
    return {
        "case": case,
        "who": name,
        f"seconds_{unit.replace(' ', '_')}": samples.median,
        "quartiles": [low, high],
        "times_ours": times,
    }
