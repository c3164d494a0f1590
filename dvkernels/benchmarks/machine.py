"""Where and when a figure was taken: a figure without that says nothing."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dvkernels._version import __version__
from dvkernels.devices import cpu

__all__: list[str] = []


def describe(arguments: Sequence[str]) -> dict[str, Any]:
    """Return versions, processor, cores, date, commit and command."""
    return {
        "dvkernels": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "numba": metadata.version("numba"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "usable_cores": cpu.usable_cores(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, "-m", "dvkernels", "bench", *arguments]),
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this file is in, None where it is installed."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"
