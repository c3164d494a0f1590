"""``python -m programs table``: the table of the page on whole programs, from a run's JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dvkernels.errors import AlgorithmError
from programs import report

__all__: list[str] = []

HELP = "print the results of a run as a table in Markdown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the argument."""
    parser.add_argument("file", metavar="FILE", help="what run --json has written")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and the paragraph below it."""
    try:
        found = json.loads(Path(arguments.file).read_text(encoding="utf-8"))
        table = report.markdown(found)
    except (ValueError, KeyError, TypeError) as error:
        raise AlgorithmError(
            f"programs: expected in {arguments.file!r} the JSON of a run ({error!r}); write it "
            f"with python -m programs run --json FILE"
        ) from None
    print(table)
    return 0
