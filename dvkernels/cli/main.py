"""The command line: one verb a module."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from dvkernels._version import __version__
from dvkernels.errors import DvKernelsError

__all__: list[str] = []

_VERBS = {
    "train": "dvkernels.cli.train",
    "launch": "dvkernels.cli.launch",
    "bench": "dvkernels.cli.bench",
    "bench-input": "dvkernels.cli.bench_input",
    "bench-checkpoint": "dvkernels.cli.bench_checkpoint",
    "bench-workers": "dvkernels.cli.bench_workers",
    "checkpoint": "dvkernels.cli.checkpoint",
    "compile": "dvkernels.cli.compile",
    "info": "dvkernels.cli.info",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit status: 0, 1 (a check failed), 2 (bad input), 130 (Ctrl-C)."""
    parser = argparse.ArgumentParser(prog="python -m dvkernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"dvkernels {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    # Together they take longer to load than launch takes to start: all only if all are listed.
    words = sys.argv[1:] if argv is None else argv
    asked = [word for word in words[:1] if word in _VERBS] or list(_VERBS)
    loaded = {name: importlib.import_module(_VERBS[name]) for name in asked}
    for name, verb in loaded.items():
        verb.add_arguments(verbs.add_parser(name, help=verb.HELP, description=verb.HELP))
    arguments = parser.parse_args(words)
    try:
        status: int = loaded[arguments.verb].run(arguments)
        return status
    except DvKernelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
