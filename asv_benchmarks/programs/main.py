"""Command line of the benchmark of whole programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dvkernels.cli import main as command_line

__all__ = ["VERBS", "main"]

VERBS = {"run": "programs.run", "table": "programs.table", "plot": "programs.plot"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb, ``run`` where none is named; return the exit status of ``python -m peers``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] not in ([verb] for verb in (*VERBS, "-h", "--help", "--version")):
        words.insert(0, "run")
    return command_line.main(words, VERBS, "python -m programs", __doc__)
