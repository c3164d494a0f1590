"""``python -m dvkernels bench-input``: how fast batches come, beside other input pipelines."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import tempfile
from typing import Any

from dvkernels._version import __version__
from dvkernels.devices import cpu
from dvkernels.errors import AlgorithmError, WorkerLostError

__all__: list[str] = []

HELP = "measure input pipelines: arrays, mapped files, decoding, beside other libraries"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds (default 7)")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="measure a peer (dataloader, grain, tensorflow) with the interpreter that has it",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure all cases, and print a line for each contestant."""
    from dvkernels.benchmarks import input as cases
    from dvkernels.benchmarks.peers import registry
    from dvkernels.benchmarks.peers.worker import Worker, end_all
    from dvkernels.benchmarks.stopwatch import ratio

    if arguments.rounds < 1:
        raise AlgorithmError(
            f"bench-input: expected --rounds of at least 1, got {arguments.rounds}"
        )
    workers: dict[str, Worker] = {}
    versions: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        started: list[Worker] = []
        stack.callback(end_all, started)
        pythons = registry.interpreters("bench-input", arguments.peer_python, cases.PEERS)
        for name, python in pythons.items():
            version = registry.version_of(cases.PEERS[name], python)
            if version is None:
                print(f"# {name} skipped: {cases.PEERS[name].how_to_get}")
                continue
            versions[name] = version
            workers[name] = Worker(name, python, 2, peers=cases.PEERS)
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
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for case, (what, _) in cases.CASES.items():
            print(f"# {case}: {what}")
            try:
                found = cases.measure(case, folder, arguments.rounds, workers)
            except WorkerLostError as error:
                print(f"# {error}")
                return 1
            ours = found["dvkernels"]
            for name, samples in found.items():
                low, high = samples.quartiles
                times = ratio(samples, ours)
                print(
                    f"{name:12} {1e6 * samples.median:10.1f} us a batch "
                    f"({1e6 * low:.1f} to {1e6 * high:.1f}), {times:6.2f} times ours"
                )
                records.append(
                    {
                        "case": case,
                        "who": name,
                        "seconds_per_batch": samples.median,
                        "quartiles": [low, high],
                        "times_ours": times,
                    }
                )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({**about, "results": records}, file, indent=1)
    return 0
