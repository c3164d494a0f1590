"""Folder names of a manager's checkpoints: ``step-`` and the step, with at least eight digits."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dvkernels.checkpoint.storage import atomic_folder
from dvkernels.errors import CheckpointError

__all__: list[str] = []

NAME = re.compile(r"step-([0-9]{8,18})")


def name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step-{step:08d}"


def step(path: Path) -> int:
    """Return the step of a checkpoint's path."""
    return int(path.name.removeprefix("step-"))


def within(directory: Path) -> tuple[Path, ...]:
    """List the checkpoints that managers have saved in a directory, in the order of their steps."""
    try:
        return tuple(sorted(atomic_folder.within(directory, NAME), key=step))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed: {error}") from error


def later_than(path: Path) -> tuple[Path, ...]:
    """List the later checkpoints beside one that a manager has saved; beside any other, none."""
    real = Path(os.path.realpath(path))
    if not NAME.fullmatch(real.name):
        return ()
    return tuple(other for other in within(real.parent) if step(other) > step(real))
