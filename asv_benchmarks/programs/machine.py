"""What a figure must name: machine, date, commit and versions."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from dvkernels._version import __version__
from dvkernels.devices import cpu

__all__ = ["about", "settle_allocator"]

_PACKAGES = ("numpy", "numba", "scikit-learn", "joblib", "threadpoolctl")
_CPUINFO = Path("/proc/cpuinfo")
_LARGE_NBYTES = 31 << 20  # just below 32 MiB, the largest that glibc's allocator learns from


def about() -> dict[str, Any]:
    """Return machine, date, commit and versions."""
    from threadpoolctl import threadpool_info

    blas = {
        f"{each['internal_api']} {each['version']}"
        for each in threadpool_info()
        if each["user_api"] == "blas"
    }
    return {
        "dvkernels": __version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{cpu.usable_cores()} usable cores of {_processor()}, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "blas": ", ".join(sorted(blas)),
    }


def settle_allocator() -> None:
    """Let this process keep the memory that it frees, as one does that has worked for a while.

    The allocator of glibc gives memory back to the system, and takes it page by page again, in
    every step of a loop, until it has seen a large array freed. Without this the time of a program
    would depend on what its process did before: by a factor of 8 for the means of blocks of 2 MiB.
    """
    np.empty(_LARGE_NBYTES, np.uint8)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    command = ("git", "describe", "--always", "--dirty", "--exclude=*")
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "an unknown processor")
