"""What a figure must name: machine, date, commit, versions, and the load by other programs."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dvkernels._version import __version__
from dvkernels.cluster import procfs
from dvkernels.devices import cpu

__all__ = ["ProcessorTime", "about", "others_share", "settle_allocator"]

_PACKAGES = ("numpy", "numba", "scikit-learn", "joblib", "threadpoolctl")
_PROC = Path("/proc")
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
        lines = (_PROC / "cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "an unknown processor")


class ProcessorTime(NamedTuple):
    """Seconds of processor time since an unnamed moment."""

    busy: float  # of the cores that this process may use, by all programs
    own: float  # of this process and its descendants
    passed: float  # of the clock

    @classmethod
    def now(cls) -> ProcessorTime | None:
        """Read the times; None where there is no ``/proc``."""
        tick = 1 / os.sysconf("SC_CLK_TCK")
        try:
            lines = (_PROC / "stat").read_text(encoding="ascii").splitlines()
            mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        except (OSError, AttributeError):
            return None
        busy = 0
        for line in lines:
            name, *fields = line.split()
            if name in mine:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
                busy += user + nice + system + irq + softirq + steal
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        own += sum(_ticks_of(pid) for pid in procfs.descendants_of(os.getpid())) * tick
        return cls(busy * tick, own, time.perf_counter())


def _ticks_of(pid: int) -> int:
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # user, system


def others_share(before: ProcessorTime | None, after: ProcessorTime | None) -> float | None:
    """Return the fraction of the usable cores that other programs took, None where unknown."""
    if before is None or after is None or after.passed <= before.passed:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / (after.passed - before.passed) / len(os.sched_getaffinity(0)))
