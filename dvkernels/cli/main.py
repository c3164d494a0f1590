"""Command line of dvkernels: data parallelism with NumPy and Numba."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dvkernels._version import __version__
from dvkernels.errors import DvKernelsError

__all__: list[str] = []

_BROKEN_PIPE = 128 + signal.SIGPIPE

_VERBS = {
    "train": "dvkernels.cli.train",
    "launch": "dvkernels.cli.launch",
    "bench": "dvkernels.cli.bench",
    "checkpoint": "dvkernels.cli.checkpoint",
    "compile": "dvkernels.cli.compile",
    "info": "dvkernels.cli.info",
    "trace": "dvkernels.cli.trace",
    "report": "dvkernels.cli.trace_report",
    "ask": "dvkernels.cli.ask",
}


def main(
    argv: Sequence[str] | None = None,
    verbs: Mapping[str, str] = _VERBS,  # name -> module
    program: str = "python -m dvkernels",
    description: str | None = __doc__,
) -> int:
    """Run one verb; return the exit status: 0, 1 (a check failed), 2 (bad input), 130 (Ctrl-C)."""
    asks_for_json = False
    words = sys.argv[1:] if argv is None else argv
    try:
        verb, arguments = _parse(words, verbs, program, description)
        asks_for_json = getattr(arguments, "json", None) in (True, "-")
        status: int = verb.run(arguments)
        sys.stdout.flush()  # raises here if the reader has closed the pipe
        return status
    except BrokenPipeError:
        # Drop the rest of the output, or the interpreter would fail to flush it at exit.
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


def _parse(
    words: Sequence[str], modules: Mapping[str, str], program: str, description: str | None
) -> tuple[Any, argparse.Namespace]:
    """Parse the command line; return the module of the verb, and its arguments."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--version", action="version", version=f"dvkernels {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    # Loading all verbs takes longer than launch takes to start: load one if it is named first.
    names = [word for word in words[:1] if word in modules] or list(modules)
    loaded = {name: importlib.import_module(modules[name]) for name in names}
    parsers = {}
    for name, verb in loaded.items():
        parsers[name] = verbs.add_parser(
            name, help=verb.HELP, description=verb.HELP, formatter_class=_HelpWithDefaults
        )
        verb.add_arguments(parsers[name])
    try:
        arguments, unknown = parser.parse_known_args(words)
        if unknown:
            parsers[arguments.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit:
        sys.stdout.flush()  # of a help; raises here if the reader has closed the pipe
        raise
    return loaded[arguments.verb], arguments


class _HelpWithDefaults(argparse.HelpFormatter):
    """Help formatter that appends the default of an option, unless its help names it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_option = bool(action.option_strings) and action.nargs != 0
        if not is_option or "default" in text or action.default in (None, argparse.SUPPRESS, []):
            return text
        return f"{text} (default %(default)s)"


def _failed(text: str, asks_for_json: bool) -> int:
    print(f"error: {text}", file=sys.stderr)
    if asks_for_json:
        print(json.dumps({"error": text}))
    return 2
