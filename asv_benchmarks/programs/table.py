"""``python -m programs table``: the table of the page on whole programs, from a run's JSON."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from dvkernels.cli import output_paths
from dvkernels.errors import AlgorithmError
from dvkernels.profiler import atomic_file
from programs import report

__all__ = ["found_in"]

HELP = "print the results of a run as a table in Markdown, or put it into a page"

# From the head of the table to the paragraph below it.
_TABLE = re.compile(r"^\| program \| way \|.*?\n\n.*?\n(?=\n)", re.DOTALL | re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", metavar="FILE", help="what run --json has written")
    parser.add_argument(
        "--page", metavar="PAGE", help="put the table there in place of the one that it has"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and the paragraph below it."""
    found = found_in(arguments.file)
    table = report.markdown(found)
    if arguments.page is None:
        print(table)
        return 0
    page = output_paths.file("--page", arguments.page)
    text, count = _TABLE.subn(lambda _: table + "\n", page.read_text(encoding="utf-8"))
    if count != 1:
        raise AlgorithmError(
            f"programs: expected in {arguments.page!r} one table that begins with "
            f"'| program | way |'; got {count}"
        )
    atomic_file.write_text(page, text)
    return 0


def found_in(name: str) -> dict[str, Any]:
    """Return the results that ``run --json`` has written.

    Raises
    ------
    AlgorithmError
        The file holds something else.
    """
    try:
        found: dict[str, Any] = json.loads(Path(name).read_text(encoding="utf-8"))
        report.markdown(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AlgorithmError(
            f"programs: expected in {name!r} the JSON of a run ({error!r}); write it with "
            f"python -m programs run --json FILE"
        ) from None
    return found
