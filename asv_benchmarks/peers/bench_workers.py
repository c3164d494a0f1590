"""``python -m peers bench-workers``: all-reduce between processes, against MPI and Gloo."""

from __future__ import annotations

import argparse

from peers import jobs, peer_bench

__all__: list[str] = []

HELP = "measure all-reduces between processes, compared with the MPI that started them and Gloo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    peer_bench.add_arguments(parser, ", ".join(jobs.PEERS))
    parser.add_argument(
        "--processes", type=int, choices=(2, 4), default=2,
        help="2: several sizes, 16-bit floats, a scalar; 4: two processes of two replicas each, "
        "and four processes",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Measure all cases, and print a line for each library."""
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
