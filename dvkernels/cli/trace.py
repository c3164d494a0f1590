"""``python -m dvkernels trace``: the traces of the workers of a job, merged on one clock."""

from __future__ import annotations

import argparse
import json

from dvkernels.cli import argument_types

__all__: list[str] = []

HELP = "merge the traces of the workers of a job into one file, on one clock"
EXAMPLES = (("all workers of a job", "python -m dvkernels trace run.worker-*.json -o run.json"),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the files."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="trace of a worker, such as run.worker-0.json"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the merged trace")
    argument_types.add_json(parser, "the clocks' offsets")


def run(arguments: argparse.Namespace) -> int:
    """Merge the files, and print what is known of each worker's clock."""
    from dvkernels.profiler import trace_merge

    offsets = trace_merge.merge(arguments.files, arguments.output)
    if arguments.json:
        print(json.dumps({"workers": [each._asdict() for each in offsets]}))
        return 0
    for each in offsets:
        known = "unknown" if each.uncertainty_ns is None else f"{each.uncertainty_ns / 1e3:,.1f} us"
        print(
            f"worker {each.worker}: {each.method}, offset {each.offset_ns / 1e3:,.1f} us, "
            f"uncertainty {known}"
        )
    return 0
