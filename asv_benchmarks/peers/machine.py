"""What a figure must name: machine, date, commit and versions."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import dvkernels
from dvkernels._version import __version__
from dvkernels.devices import cpu

__all__ = ["BUSY", "about", "commit_date", "settle_allocator"]

BUSY = 0.1  # share of the cores that other programs may take, before a comparison means nothing
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


def commit_date(commit: str) -> str | None:
    """Return when a commit was made, in UTC; None for one that is not of this clone."""
    seconds = _git("show", "-s", "--format=%ct", commit.removesuffix("-dirty"))
    if not seconds:
        return None
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).isoformat()


def _commit() -> str:
    """Return the commit of the library; "dirty" if a source has changed, not for new results."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/dvkernels", ":/asv_benchmarks/**.py")
    return f"{commit}-dirty" if commit and changed else commit or "unknown"


def _git(*words: str) -> str:
    """Return what git prints, empty where it fails or there is none."""
    try:
        found = subprocess.run(
            ("git", *words),
            cwd=Path(dvkernels.__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pairs = (line.partition(":") for line in lines)
    values = {key.strip(): value.strip() for key, _, value in pairs}  # of the last core
    if "model name" not in values:
        return platform.processor() or "an unknown processor"
    numbers = [("family", values.get("cpu family")), ("model", values.get("model"))]
    family = ", ".join(f"{name} {number}" for name, number in numbers if number)
    return values["model name"] + (f" ({family})" if family else "")
