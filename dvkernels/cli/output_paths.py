"""Output files and folders of the command line, checked for write access before the work."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvkernels.errors import DvKernelsError

__all__: list[str] = []


class OutputError(DvKernelsError, OSError):
    """An output file or folder cannot be written."""


def file(option: str, name: str) -> Path:
    """Return the path of an output file after a check that it can be written.

    An existing file keeps its contents.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    from dvkernels.profiler.atomic_file import AtomicFile

    try:
        AtomicFile(name).discard()
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{option}: cannot write {name!r} ({_reason(error)}); give a file in an existing, "
            f"writable folder"
        ) from None
    return Path(name)


def folder(option: str, name: str, *, create: bool = False) -> Path:
    """Return the path of an output folder after a check that files can be created in it.

    With ``create`` the folder itself is created if it does not exist.

    Raises
    ------
    OutputError
        Files cannot be created there.
    """
    path = Path(name)
    try:
        if create:
            path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{option}: cannot write into {name!r} ({_reason(error)}); give another folder"
        ) from None
    return path


class JsonOutput:
    """Destination of ``--json [FILE]``: a file, standard output (``-``), or none."""

    def __init__(self, name: str | None) -> None:
        self.is_stdout = name == "-"
        self._path = None if name is None or self.is_stdout else file("--json", name)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record, if it has a destination."""
        from dvkernels.profiler import atomic_file

        text = json.dumps(record, indent=1)
        if self.is_stdout:
            print(text)
        elif self._path is not None:
            atomic_file.write_text(self._path, text + "\n")


def plot(name: str) -> Path:
    """Return the path of a plot after a check that matplotlib can write its format there."""
    from dvkernels.benchmarks import plot

    path = Path(name)
    plot.check(path)
    return file("--plot", name)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
