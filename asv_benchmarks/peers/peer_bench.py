"""Frame of the benchmarks against peer libraries: options, rounds in turn, table and JSON."""

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
from dvkernels.benchmarks.stopwatch import Samples, ratio
from dvkernels.cli import argument_types, output_paths
from dvkernels.devices import cpu
from dvkernels.errors import AlgorithmError, WorkerLostError
from dvkernels.profiler import atomic_file
from peers import registry
from peers.registry import Peer
from peers.worker import Worker, end_all

__all__: list[str] = []

# Given a case, a folder and the peers' workers, returns the seconds of each library; "dvkernels" is
# this one.
Measure = Callable[[str, str, Mapping[str, Worker]], Mapping[str, Samples]]


class PeerBench(NamedTuple):
    """A benchmark of this library against its peers."""

    command: str
    cases: Mapping[str, str]  # name -> description
    peers: Mapping[str, Peer]
    measure: Measure
    unit: str  # of the seconds: "per batch"
    folder: str | None = None  # where a temporary folder is created; None: the system's place
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
        help=f"measure a peer ({peers}), with the interpreter of its environment",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there as JSON")


def run(bench: PeerBench, arguments: argparse.Namespace) -> int:
    """Measure all cases, and print a line for each library."""
    if arguments.rounds < 1:
        raise AlgorithmError(
            f"{bench.command}: expected --rounds of at least 1, got {arguments.rounds}"
        )
    if arguments.json is not None:
        output_paths.file("--json", arguments.json)
    if bench.folder is not None:
        output_paths.folder("--folder", bench.folder)
    workers: dict[str, Worker] = {}
    versions: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        started: list[Worker] = []
        stack.callback(end_all, started)
        pythons = registry.interpreters(bench.command, arguments.peer_python, bench.peers)
        for name, python in pythons.items():
            version = registry.version_of(bench.peers[name], python)
            if version is None:
                print(f"# {name} skipped: {bench.peers[name].how_to_get}")
                continue
            versions[name] = version
            workers[name] = Worker(name, python, bench.num_ranks, peers=bench.peers)
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
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=bench.folder))
        for case, description in bench.cases.items():
            print(f"# {case}: {description}")
            try:
                found = bench.measure(case, folder, workers)
            except WorkerLostError as error:
                print(f"# {error}")
                return 1
            for name in found:
                records.append(_record(case, name, found, bench.unit))
                _print_record(records[-1], found[name], bench.unit)
    if arguments.json:
        atomic_file.write_text(arguments.json, json.dumps({**about, "results": records}, indent=1))
    return 0


def _record(case: str, name: str, found: Mapping[str, Samples], unit: str) -> dict[str, Any]:
    """Return the JSON record of one library's time."""
    samples = found[name]
    low, high = samples.quartiles
    return {
        "case": case,
        "who": name,
        f"seconds_{unit.replace(' ', '_')}": samples.median,
        "quartiles": [low, high],
        "times_ours": ratio(samples, found["dvkernels"]),
    }


def _print_record(record: Mapping[str, Any], samples: Samples, unit: str) -> None:
    low, high = record["quartiles"]
    print(
        f"{record['who']:13} {1e6 * samples.median:12.1f} us {unit} "
        f"({1e6 * low:.1f} to {1e6 * high:.1f}), {record['times_ours']:6.2f} times ours"
    )
