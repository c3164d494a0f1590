"""Usage of this process's cores: by other programs, and by threads of libraries."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from dvkernels.cluster import procfs

__all__ = ["CoreUsage", "ThreadUsage", "share_a_physical_core"]

_PROC = Path("/proc")
_STAT = _PROC / "stat"
_CORES = Path("/sys/devices/system/cpu")
_IDLE = (3, 4)  # columns of idle time and of waiting for I/O
_GUEST = 8  # the columns from here on are part of earlier ones


class CoreUsage:
    """Clock of the time that other programs spend on the cores in this process's affinity.

    Examples
    --------
    >>> usage = CoreUsage()
    >>> share = usage.share_of_others()
    >>> share is None or 0 <= share <= 1
    True
    """

    def __init__(self) -> None:
        self._wall, self._busy, self._own = _now()

    def share_of_others(self) -> float | None:
        """Return the share of the cores' time since the start that others took.

        The processes that this one has started are its own; interrupts and a hypervisor count as
        others. None where ``/proc/stat`` does not exist, or
        before a tick of its clock has passed.
        """
        wall, busy, own = _now()
        if busy is None or self._busy is None or wall - self._wall < 2 / os.sysconf("SC_CLK_TCK"):
            return None
        others = (busy - self._busy) - (own - self._own)
        return min(1.0, max(0.0, others / (wall - self._wall) / len(_cores())))


class ThreadUsage:
    """Clock of the processor time of this process's threads.

    Threads that Python does not know are those of libraries: BLAS, OpenMP, Numba.

    Examples
    --------
    >>> ThreadUsage().report()["cores"] >= 1
    True
    """

    def __init__(self) -> None:
        self._before = _seconds_by_thread()

    def report(self) -> dict[str, Any]:
        """Return the cores, and the seconds since the start that each thread took, most first.

        Threads that have ended meanwhile are left out.
        """
        python = {thread.native_id for thread in threading.enumerate()}
        took: dict[bool, list[float]] = {True: [], False: []}
        for number, seconds in _seconds_by_thread().items():
            took[number in python].append(round(seconds - self._before.get(number, 0.0), 6))
        return {
            "cores": len(_cores()),
            "thread_seconds": sorted(took[True], reverse=True),
            "library_thread_seconds": sorted(took[False], reverse=True),
        }


def share_a_physical_core() -> bool:
    """Return whether two of this process's cores are threads of one physical core.

    A virtual machine may not show it.
    """
    known = [path for core in _cores() if (path := _siblings_path(core)).exists()]
    physical = {path.read_text(encoding="ascii") for path in known}
    return len(physical) < len(known)


def _siblings_path(core: int) -> Path:
    return _CORES / f"cpu{core}" / "topology" / "thread_siblings_list"


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _now() -> tuple[float, float | None, float]:
    """Return wall-clock time, the busy time of the cores, and that of these processes [s]."""
    busy, times = _busy_seconds(), os.times()
    own = times.user + times.system + times.children_user + times.children_system
    if busy is not None:
        own += sum(_seconds_of(_PROC / str(pid)) for pid in procfs.descendants_of(os.getpid()))
    return time.perf_counter(), busy, own


def _seconds_by_thread() -> dict[int, float]:
    try:
        return {int(path.name): _seconds_of(path) for path in (_PROC / "self" / "task").iterdir()}
    except OSError:
        return {}


def _seconds_of(path: Path) -> float:
    """Return the processor time of a process or thread; 0 if it has ended."""
    try:
        stat = (path / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user, system


def _busy_seconds() -> float | None:
    names = {f"cpu{core}" for core in _cores()}
    try:
        rows = [line.split() for line in _STAT.read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    ticks = [
        int(number)
        for name, *numbers in rows
        if name in names
        for column, number in enumerate(numbers[:_GUEST])
        if column not in _IDLE
    ]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")
