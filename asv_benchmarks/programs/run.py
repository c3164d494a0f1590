"""``python -m programs run``: whole programs, compared with other ways to write them."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec

from peers import machine, registry

from dvkernels.cli import argument_types, output_paths
from dvkernels.devices import cpu
from dvkernels.errors import AlgorithmError
from dvkernels.profiler import atomic_file
from programs import other_processes, report
from programs.all_cores import AllCores
from programs.registry import PROGRAMS

__all__: list[str] = []

HELP = "measure whole programs, compared with other ways to write them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    known = ", ".join(PROGRAMS)
    parser.add_argument(
        "programs", nargs="*", metavar="PROGRAM", help=f"{known}; all if none is named"
    )
    parser.add_argument(
        "--rounds", type=argument_types.positive, default=11, help="alternating rounds"
    )
    parser.add_argument(
        "--replicas",
        type=argument_types.positive,
        help="replicas, and threads of the other ways (default: one per usable core)",
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help=f"interpreter of the environment of a peer ({', '.join(other_processes.PEERS)}; "
        "default: this one)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print the programs."""
    if find_spec("threadpoolctl") is None:
        raise AlgorithmError(
            "programs: needs threadpoolctl, which sets the threads of BLAS; install the bench "
            "extra: python -m pip install 'dvkernels[bench]'"
        )
    from programs.comparison import compare  # needs threadpoolctl

    for name in arguments.programs:
        if name not in PROGRAMS:
            raise AlgorithmError(
                f"programs: expected programs of {', '.join(PROGRAMS)}; got {name!r}"
            )
    if arguments.json is not None:
        output_paths.file("--json", arguments.json)
    replicas = arguments.replicas or cpu.usable_cores()
    pythons = registry.interpreters("programs", arguments.peer_python, other_processes.PEERS)
    about = {
        **machine.about(),
        "peers": other_processes.versions(pythons),
        "rounds": arguments.rounds,
    }
    print("# " + ", ".join(f"{key}: {value}" for key, value in about.items()))
    records = []
    with AllCores(replicas) as cores:
        for name in arguments.programs or PROGRAMS:
            missing = [each for each in PROGRAMS[name].needs if find_spec(each) is None]
            if missing:
                print(f"# {name} skipped: {', '.join(missing)} is not installed")
                continue
            found = compare(PROGRAMS[name], replicas, arguments.rounds, cores, pythons)
            records.append(found.as_record())
            print(report.text(records[-1]), flush=True)
    if arguments.json is not None:
        atomic_file.write_text(arguments.json, json.dumps({**about, "results": records}, indent=1))
    return 0
