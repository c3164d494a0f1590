"""``python -m dvkernels checkpoint``: contents and integrity of checkpoints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dvkernels.cli import argument_types

__all__: list[str] = []

HELP = "show the contents of a checkpoint, or verify that every byte is as it was written"
EXAMPLES = (
    ("what the newest checkpoints hold", "python -m dvkernels checkpoint show runs/digits"),
    ("whether all bytes are intact", "python -m dvkernels checkpoint verify runs/digits"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "action", choices=("show", "verify"), help="read the manifest, or all bytes"
    )
    parser.add_argument("path", type=Path, help="a checkpoint, or a folder of a CheckpointManager")
    argument_types.add_json(parser, "what was found of each checkpoint")


def run(arguments: argparse.Namespace) -> int:
    """Show or verify one checkpoint, or all of a folder; return 1 if one of them is damaged."""
    from dvkernels.cli import checkpoint_contents

    checkpoints = []
    for found in checkpoint_contents.examine(arguments.path, arguments.action):
        checkpoints.append(found)
        if not arguments.json:
            for line in checkpoint_contents.lines(found):
                print(_printable(line))
    if arguments.json:
        print(json.dumps({"checkpoints": checkpoints}))
    return 1 if any(found["outcome"] == "FAIL" for found in checkpoints) else 0


def _printable(line: str) -> str:
    """Return a line without control sequences: the names in a checkpoint are not trusted."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
