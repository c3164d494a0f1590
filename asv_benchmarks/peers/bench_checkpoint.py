"""``python -m peers bench-checkpoint``: speed of checkpoints, compared with other libraries."""

from __future__ import annotations

import argparse

from dvkernels.cli import argument_types
from peers import checkpoints as cases
from peers import peer_bench

__all__: list[str] = []

HELP = "measure saving and restoring, compared with other libraries, and how long a save blocks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    peer_bench.add_arguments(parser, "safetensors, savez, torch, orbax")
    parser.add_argument(
        "--mebibytes", type=argument_types.positive, default=1024, help="total size of the arrays"
    )
    parser.add_argument("--folder", help="where to write (default: /dev/shm, if there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Measure all cases, and print a line for each library."""
    nbytes = arguments.mebibytes << 20
    return peer_bench.run(
        peer_bench.PeerBench(
            "bench-checkpoint",
            cases.CASES,
            cases.PEERS,
            lambda case, folder, workers: cases.measure(
                case, folder, nbytes, arguments.rounds, workers
            ),
            "per call",
            arguments.folder or cases.memory_folder(),
        ),
        arguments,
    )
