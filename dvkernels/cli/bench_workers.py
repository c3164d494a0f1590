"""``python -m dvkernels bench-workers``: how fast processes reduce, beside their MPI and Gloo."""

from __future__ import annotations

import argparse

from dvkernels.benchmarks import jobs
from dvkernels.cli import peer_bench

__all__: list[str] = []

HELP = "measure all-reduces between processes, beside the MPI that started them and Gloo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    peer_bench.add_arguments(parser, ", ".join(jobs.PEERS))
    parser.add_argument(
        "--processes", type=int, choices=(2, 4), default=2,
        help="2: sizes, half types, a number; 4: two replicas in each of two, beside four",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Measure all cases, and print a line for each contestant."""
    return peer_bench.run(
        peer_bench.PeerBench(
            "bench-workers",
            jobs.cases(arguments.processes),
            jobs.PEERS,
            lambda case, folder, workers: jobs.measure(case, arguments.rounds, workers),
            "per call",
            num_ranks=arguments.processes,
        ),
        arguments,
    )
