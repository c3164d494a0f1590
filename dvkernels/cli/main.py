"""The command line: one verb a module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dvkernels._version import __version__
from dvkernels.cli import bench, bench_checkpoint, bench_input, checkpoint, info, train
from dvkernels.errors import DvKernelsError

__all__: list[str] = []

_VERBS = {
    "train": train,
    "bench": bench,
    "bench-input": bench_input,
    "bench-checkpoint": bench_checkpoint,
    "checkpoint": checkpoint,
    "info": info,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit status: 0, 1 (a check failed), 2 (bad input), 130 (Ctrl-C)."""
    parser = argparse.ArgumentParser(prog="python -m dvkernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"dvkernels {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in _VERBS.items():
        verb.add_arguments(verbs.add_parser(name, help=verb.HELP, description=verb.HELP))
    arguments = parser.parse_args(argv)
    try:
        status: int = _VERBS[arguments.verb].run(arguments)
        return status
    except DvKernelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
