"""Files and folders that options name: whether they can be written is found out before the work."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dvkernels.errors import DvKernelsError
from dvkernels.profiler.atomic_file import AtomicFile

__all__: list[str] = []


class OutputError(DvKernelsError, OSError):
    """What an option names cannot be written."""


def file(option: str, name: str) -> Path:
    """Return the path of a file that can be written; what it holds stays until that is done.

    Raises
    ------
    OutputError
        It cannot.
    """
    try:
        AtomicFile(name).discard()
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{option}: cannot write {name!r} ({_reason(error)}); give a file in a folder that is "
            f"there and may be written"
        ) from None
    return Path(name)


def folder(option: str, name: str, *, is_made: bool = False) -> Path:
    """Return the path of a folder in which files can be made; with ``is_made`` it is made itself.

    Raises
    ------
    OutputError
        They cannot.
    """
    path = Path(name)
    try:
        if is_made:
            path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{option}: cannot write into {name!r} ({_reason(error)}); give another folder"
        ) from None
    return path


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
