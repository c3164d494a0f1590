"""Command line of dvkernels: data parallelism with NumPy and Numba."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dvkernels._version import __version__
from dvkernels.errors import DvKernelsError

__all__: list[str] = []

# Importing these modules loads neither NumPy nor Numba: a help text does not wait for them.
VERBS = {
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

_BAD_INPUT, _OWN_ERROR, _INTERRUPTED, _BROKEN_PIPE = 2, 70, 130, 141

EXIT_STATUSES = {
    0: "all is well",
    1: "a check failed: a wrong element, a damaged checkpoint, a training that diverged",
    _BAD_INPUT: "wrong options, or something is missing: a file, a device, a package, memory, disk",
    42: "train: saved after SIGTERM or SIGUSR1, to be resumed (--preemption-exit-code)",
    _OWN_ERROR: "an error in dvkernels itself; --debug prints its traceback",
    124: "launch: the time of --timeout is over",
    129: "train: saved after SIGHUP",
    _INTERRUPTED: "Ctrl-C",
    _BROKEN_PIPE: "no process reads the output any more",
}
_OF_LAUNCH = "launch otherwise exits with the status of the worker that failed first."


def main(
    argv: Sequence[str] | None = None,
    verbs: Mapping[str, str] = VERBS,  # name -> module
    program: str = "python -m dvkernels",
    description: str | None = __doc__,
) -> int:
    """Run one verb; return the exit status, one of ``EXIT_STATUSES`` or that of a job."""
    arguments = argparse.Namespace(debug=False)
    try:
        words = sys.argv[1:] if argv is None else argv
        verb = _parse(words, verbs, program, description, arguments)
        status: int = verb.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # raises here if the reader has closed the pipe, or the disk is full
        return status
    except BrokenPipeError:
        return _BROKEN_PIPE
    except KeyboardInterrupt as error:
        return _failed(error, "interrupted", _INTERRUPTED, arguments)
    except OSError as error:
        parts = [str(part) for part in (error.filename, error.strerror) if part is not None]
        text = ": ".join(parts) or str(error)
        return _failed(error, text, _BAD_INPUT, arguments)
    except DvKernelsError as error:
        return _failed(error, str(error), _BAD_INPUT, arguments)
    except MemoryError as error:
        return _failed(error, f"not enough memory: {error}", _BAD_INPUT, arguments)
    except Exception as error:
        text = f"{type(error).__name__}: {error}; this is an error in dvkernels"
        return _failed(error, f"{text}: --debug prints its traceback", _OWN_ERROR, arguments)
    finally:
        _drop_unwritable_output()


def _parse(
    words: Sequence[str],
    modules: Mapping[str, str],
    program: str,
    description: str | None,
    arguments: argparse.Namespace,
) -> Any:
    """Parse the command line into ``arguments``; return the module of the verb."""
    # Loading all verbs takes longer than launch takes to start: load one if it is named first.
    names = [word for word in words[:1] if word in modules] or list(modules)
    loaded = {name: importlib.import_module(modules[name]) for name in names}
    parser, parsers = parser_of(loaded, program, description)
    try:
        _, unknown = parser.parse_known_args(words, arguments)
        if unknown:
            parsers[arguments.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit:
        if sys.stdout is not None:
            sys.stdout.flush()  # of a help
        raise
    return loaded[arguments.verb]


def parser_of(
    verbs: Mapping[str, Any], program: str, description: str | None
) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of the command line, and that of each verb.

    A verb is a module with ``HELP``, ``add_arguments``, ``run`` and, for the end of its help,
    ``EXAMPLES``: pairs of what is done, and the command.
    """
    parser = _Parser(
        prog=program,
        description=description,
        epilog=_statuses(),
        formatter_class=HelpWithDefaults,
    )
    parser.add_argument("--version", action="version", version=f"dvkernels {__version__}")
    _add_debug(parser, default=False)
    chosen = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    parsers = {}
    for name, verb in verbs.items():
        parsers[name] = chosen.add_parser(
            name,
            help=verb.HELP,
            description=f"{verb.HELP[0].upper()}{verb.HELP[1:]}.",
            epilog=_examples(getattr(verb, "EXAMPLES", ()), f"{program} --help"),
            formatter_class=HelpWithDefaults,
        )
        _add_debug(parsers[name], default=argparse.SUPPRESS)
        verb.add_arguments(parsers[name])
    return parser, parsers


def _add_debug(parser: argparse.ArgumentParser, default: Any) -> None:
    text = "print the traceback of an error"
    parser.add_argument("--debug", action="store_true", default=default, help=text)


def _statuses() -> str:
    rows = [f"  {status:<4} {meaning}" for status, meaning in EXIT_STATUSES.items()]
    return "\n".join(["exit status:", *rows, _OF_LAUNCH])


def _examples(examples: Iterable[tuple[str, str]], overview: str) -> str:
    lines = [line for what, command in examples for line in (f"  # {what}", f"  {command}")]
    heading = ["examples:"] if lines else []
    return "\n".join([*heading, *lines, f"{overview} explains the exit status."])


class _Parser(argparse.ArgumentParser):
    """Parser that says when its help cannot be written, which ``argparse`` ignores."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.color = False  # Python 3.14 would colour the help, and count the colours as width

    def _print_message(self, message: str, file: Any = None) -> None:
        stream = sys.stderr if file is None else file
        if message and stream is not None:
            stream.write(message)


class HelpWithDefaults(argparse.HelpFormatter):
    """Help formatter for terminals of any width, which appends defaults that no help names."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_option = bool(action.option_strings) and action.nargs != 0
        if not is_option or "default" in text or action.default in (None, argparse.SUPPRESS, []):
            return text
        return f"{text} (default %(default)s)"

    def _format_usage(self, usage: str | None, *arguments: Any) -> str:
        text = super()._format_usage(usage, *arguments)
        return text if usage is None else f"{_wrapped(text.strip(), self._width, 7)}\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap each line by itself; one that is indented is a comment, a command or a status."""
        return "\n".join(indent + _filled(line, width) for line in text.splitlines())


def _filled(line: str, width: int) -> str:
    if line.startswith("  # "):
        return _wrapped(line, width, "  # ")
    if line.startswith("  ") and not line.lstrip()[0].isdigit():  # a command goes on after \
        return _wrapped(line, width - 2, 6).replace("\n", " \\\n")
    return _wrapped(line, width, 7 if line.startswith("  ") else 0)


def _wrapped(text: str, width: int, indent: int | str) -> str:
    following = indent if isinstance(indent, str) else " " * indent
    return textwrap.fill(
        text,
        max(width, 9),  # of a terminal of a few columns
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _failed(error: BaseException, text: str, status: int, arguments: argparse.Namespace) -> int:
    """Report an error in one line, as JSON too if that was asked for; return the exit status."""
    with contextlib.suppress(OSError):  # both streams may be on a full disk
        if arguments.debug:
            traceback.print_exception(error)
        is_error = status != _INTERRUPTED
        print(f"error: {text}" if is_error else text, file=sys.stderr)
        if is_error and getattr(arguments, "json", None) in (True, "-"):
            print(json.dumps({"error": text}))
    return status


def _drop_unwritable_output() -> None:
    """Drop output that cannot be written, or the interpreter would fail to flush it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
