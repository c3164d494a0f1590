"""Identity of this process: which worker of its job it is, and whose clock it reads."""

from __future__ import annotations

import functools
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

from dvkernels.cluster import resolvers

__all__: list[str] = []

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ProcessIdentity(NamedTuple):
    """Process of a job, at a moment of its clock, which all processes of a boot of a host share."""

    worker: int
    num_workers: int
    pid: int
    host: str
    clock: str  # the same for processes whose clocks are one
    began: int  # of time.perf_counter_ns, where the trace begins
    unix_ns: int  # the same moment by the clock of the system


def describe() -> ProcessIdentity:
    """Describe this process now; raise ``ClusterError`` if the launcher's variables are malformed.

    A task that is no worker, an evaluator, counts as the worker behind the last.
    """
    resolver = resolvers.default_resolver()
    worker = resolver.num_workers if resolver.worker_id is None else resolver.worker_id
    host = platform.node()
    try:
        clock = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        clock = host
    return ProcessIdentity(
        worker, resolver.num_workers, os.getpid(), host, clock,
        time.perf_counter_ns(), time.time_ns(),
    )  # fmt: skip


@functools.cache
def number() -> int:
    """Return the number of this process among the workers of its job."""
    return describe().worker
