"""``python -m peers bench-input``: speed of input pipelines, compared with other libraries."""

from __future__ import annotations

import argparse

from peers import input as cases
from peers import peer_bench

__all__: list[str] = []

HELP = "measure input pipelines: arrays, mapped files, decoding, compared with other libraries"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    peer_bench.add_arguments(parser, "dataloader, grain, tensorflow")


def run(arguments: argparse.Namespace) -> int:
    """Measure all cases, and print a line for each library."""
    return peer_bench.run(
        peer_bench.PeerBench(
            "bench-input",
            {case: description for case, (description, _) in cases.CASES.items()},
            cases.PEERS,
            lambda case, folder, workers: cases.measure(case, folder, arguments.rounds, workers),
            "per batch",
        ),
        arguments,
    )
