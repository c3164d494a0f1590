"""The command line: one verb a module."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from dvkernels._version import __version__
from dvkernels.errors import DvKernelsError

__all__: list[str] = []

_BROKEN_PIPE = 128 + signal.SIGPIPE

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
    asks_for_json = False
    try:
        verb, arguments = _read(sys.argv[1:] if argv is None else argv)
        asks_for_json = getattr(arguments, "json", None) in (True, "-")
        status: int = verb.run(arguments)
        sys.stdout.flush()  # where nobody reads any more, it is known now
        return status
    except BrokenPipeError:
        # What is still to be written goes nowhere, or the interpreter would complain at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (DvKernelsError, OSError) as error:
        return _failed(str(error), asks_for_json)
    except MemoryError as error:
        return _failed(f"not enough memory: {error}", asks_for_json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _read(words: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """Return the module of the verb, and what its options say."""
    parser = argparse.ArgumentParser(prog="python -m dvkernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"dvkernels {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    # Together they take longer to load than launch takes to start: all only if all are listed.
    asked = [word for word in words[:1] if word in _VERBS] or list(_VERBS)
    loaded = {name: importlib.import_module(_VERBS[name]) for name in asked}
    parsers = {}
    for name, verb in loaded.items():
        parsers[name] = verbs.add_parser(
            name, help=verb.HELP, description=verb.HELP, formatter_class=_Defaults
        )
        verb.add_arguments(parsers[name])
    try:
        arguments, more = parser.parse_known_args(words)
        if more:
            parsers[arguments.verb].error(f"unrecognized arguments: {' '.join(more)}")
    except SystemExit:
        sys.stdout.flush()  # as above: a help is printed by now
        raise
    return loaded[arguments.verb], arguments


class _Defaults(argparse.HelpFormatter):
    """Says the default of every option that has one, unless its help does."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        is_option = bool(action.option_strings) and action.nargs != 0
        if not is_option or "default" in said or action.default in (None, argparse.SUPPRESS, []):
            return said
        return f"{said} (default %(default)s)"


def _failed(text: str, asks_for_json: bool) -> int:
    print(f"error: {text}", file=sys.stderr)
    if asks_for_json:
        print(json.dumps({"error": text}))
    return 2
