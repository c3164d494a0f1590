"""Logical CPU devices: one per core that this process may use."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

from dvkernels.cluster import launcher_environment, procfs
from dvkernels.cluster.position import Position

__all__: list[str] = []


class HostShare(NamedTuple):
    """Cores that the processes of a host group have together, and their number."""

    together: int
    num_workers: int


_host_share: HostShare | None = None  # of the latest host group that this process is in


def enter_host_group(found: HostShare) -> None:
    """Share the cores with the other processes of a host group, from now on."""
    global _host_share
    _host_share = found
    usable_cores.cache_clear()


def leave_host_group(found: HostShare) -> None:
    """Share the cores with no other process any more, unless another group was entered since."""
    global _host_share
    if _host_share is found:
        _host_share = None
        usable_cores.cache_clear()


@functools.cache
def usable_cores() -> int:
    """Return the number of cores that this process may use: its affinity, capped by a cgroup quota.

    Under a launcher that started several workers on this host, or in a host group, it is this
    worker's share of them.

    Computed once per process: reading the quota takes 50 microseconds, as long as a step.
    """
    quota = quota_of_this_process()
    own = len(affinity_of(0))
    if _host_share is not None:
        return share(own, _host_share.together, quota, _host_share.num_workers)
    found = launcher_environment.find(os.environ)
    num_local = 1 if found is None else found[1].num_local_workers or 1
    if found is None or num_local == 1:
        return share(own, own, quota, 1)
    return share(own, len(affinity_of(_launcher_above(found))), quota, num_local)


def share(own: int, together: float, quota: float, num_local_workers: int) -> int:
    """Return the number of cores that one of the workers of a host may use.

    ``own`` are the cores in its affinity: a few if its launcher has bound it, else all. The workers
    may run on the cores ``together``, the affinity of their launcher, and use ``quota`` of them.

    >>> share(own=8, together=8, quota=math.inf, num_local_workers=2)  # not bound
    4
    >>> share(own=3, together=8, quota=math.inf, num_local_workers=2)  # bound
    3
    >>> share(own=2, together=2, quota=1.5, num_local_workers=4)
    1
    """
    return max(1, min(own, math.ceil(min(together, quota)) // num_local_workers))


def described_affinity() -> str:
    """Return the cores in the affinity of this process, as text: ``cores 0-3,8``."""
    if not hasattr(os, "sched_getaffinity"):
        return "any core"
    runs: list[list[int]] = []
    for core in sorted(os.sched_getaffinity(0)):
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    shown = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{'core' if shown.isdecimal() else 'cores'} {shown}"


def affinity_of(pid: int) -> set[int]:
    """Return the cores in a process's affinity; this process's for 0 and for ended ones."""
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count() or 1))
    try:
        return os.sched_getaffinity(pid)
    except OSError:
        return os.sched_getaffinity(0)


def quota_of_this_process() -> float:
    """Return the quota of this process's cgroup in cores, infinity where there is none."""
    return cgroup_quota(Path("/sys/fs/cgroup"))


def _launcher_above(found: tuple[str, Position]) -> int:
    """Return the process that started the workers of this host, 0 where it is not visible.

    It is the closest ancestor whose environment does not hold the same position in the same job:
    in between may be a shell, or a worker whose child this process is.
    """
    pid = os.getppid()
    while pid > 1:
        environment = procfs.environment_of(pid)  # None for another user's, such as slurmstepd
        if environment is None or launcher_environment.find(environment) != found:
            return pid
        pid = procfs.parent_of(pid)
    return 0


def cgroup_quota(root: Path) -> float:
    """Return the quota of the cgroup in cores, infinity where there is none."""
    try:  # version 2: "max 100000", or "150000 100000" (microseconds used per period)
        quota, period = (root / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:  # version 1: one number per file, -1 for no limit
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 < period_us else math.inf
    except (OSError, ValueError):
        return math.inf
