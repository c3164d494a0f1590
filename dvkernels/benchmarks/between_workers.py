"""How long an all-reduce between workers takes, by size, and the constants that the model needs.

Every worker of a job runs this, under ``mpiexec``; the times are those of the slowest one.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dvkernels.benchmarks.stopwatch import Samples
from dvkernels.cluster import hosts
from dvkernels.cluster.resolvers import ClusterResolver
from dvkernels.communicators.base import Workers
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules import cost
from dvkernels.schedules.cost import Link

__all__ = ["SIZES", "Calibration", "as_record", "calibrate", "describe", "fit", "modelled"]

# Where one message is enough, where pieces and parts begin, and what networks have.
SIZES = tuple(4 << k for k in (0, 8, 12, 14, 16, 18, 20, 22, 24))
_SECONDS_PER_ROUND = 0.02
_TIMEOUT_SECONDS = 120.0


class Calibration(NamedTuple):
    """What was measured, and the constants that follow."""

    num_workers: int
    num_hosts: int
    link: Link
    samples: dict[int, Samples]  # by bytes


def calibrate(resolver: ClusterResolver, num_rounds: int) -> Calibration:
    """Measure between the workers of the job; all of them call this."""
    # Loads MPI: not before somebody wants it.
    from dvkernels.communicators import mpi

    workers = mpi.connect(resolver, _TIMEOUT_SECONDS)
    apart: list[Any] = hosts.pretended(os.environ, workers.size) or [platform.node()]
    num_hosts = len({host for each in workers.exchange(apart) for host in each})
    return _measure(workers, num_hosts, num_rounds)


def _measure(workers: Workers, num_hosts: int, num_rounds: int) -> Calibration:
    samples: dict[int, list[float]] = {nbytes: [] for nbytes in SIZES}
    held = {nbytes: np.ones(nbytes // 4, np.float32) for nbytes in SIZES}
    calls = {nbytes: 3 for nbytes in SIZES}
    for number in range(num_rounds + 1):
        for nbytes in SIZES:
            seconds = _slowest(workers, held[nbytes], calls[nbytes])
            if number:
                samples[nbytes].append(seconds)
            else:  # warm, and all agree on how often
                calls[nbytes] = int(np.clip(_SECONDS_PER_ROUND / seconds, 3, 2000))
    found = {nbytes: Samples(tuple(seconds)) for nbytes, seconds in samples.items()}
    return Calibration(workers.size, num_hosts, fit(workers.size, num_hosts, found), found)


def _slowest(workers: Workers, array: Any, count: int) -> float:
    """Return the seconds of a call, on the slowest worker."""
    out = np.empty_like(array)
    workers.all_reduce([array], ReduceOp.SUM, [out])
    workers.meet()
    began = time.perf_counter()
    for _ in range(count):
        workers.all_reduce([array], ReduceOp.SUM, [out])
    seconds = (time.perf_counter() - began) / count
    return float(max(workers.exchange(seconds)))


def fit(num_workers: int, num_hosts: int, samples: Mapping[int, Samples]) -> Link:
    """Return the constants of the least squares of relative errors; the rate may be infinite.

    The model is linear in the latency and in the time of a byte.
    """

    def column(link: Link) -> Any:
        modeled = [modelled(num_workers, num_hosts, link, nbytes) for nbytes in samples]
        return np.array(modeled) / [one.median for one in samples.values()]

    latencies, moved = column(Link(1.0, np.inf)), column(Link(0.0, 1.0))
    both = np.column_stack([latencies, moved])
    latency, per_byte = np.linalg.lstsq(both, np.ones(len(samples)))[0]
    if latency <= 0 or per_byte <= 0:  # one of them is not seen beside the other
        kept, other = (latencies, moved) if per_byte <= 0 else (moved, latencies)
        alone = (kept @ np.ones(len(kept))) / (kept @ kept)
        latency, per_byte = (alone, 0.0) if other is moved else (0.0, alone)
    return Link(float(latency), float(1 / per_byte) if per_byte else math.inf)


def modelled(num_workers: int, num_hosts: int, link: Link, nbytes: int) -> float:
    """Return the seconds that the model gives: over shared memory, or between hosts."""
    if num_hosts == 1:
        return cost.memory_seconds(link, num_workers, nbytes)
    return cost.message_seconds(link, num_workers, num_hosts, nbytes)


def describe(found: Calibration) -> str:
    """Return the constants, and each time beside what the model makes of them."""
    over = "in shared memory" if found.num_hosts == 1 else f"by messages of {found.num_hosts} hosts"
    lines = [
        f"{found.num_workers} workers {over}: latency "
        f"{found.link.latency_seconds * 1e6:.2f} us, rate {found.link.rate / 1e9:.2f} GB/s",
        f"{'bytes':>10} {'measured':>10} {'quartiles':>21} {'model':>10}",
    ]
    for nbytes, samples in found.samples.items():
        model = modelled(found.num_workers, found.num_hosts, found.link, nbytes)
        low, high = samples.quartiles
        lines.append(
            f"{nbytes:10} {samples.median * 1e6:7.1f} us {low * 1e6:8.1f} to "
            f"{high * 1e6:7.1f} us {model * 1e6:7.1f} us"
        )
    return "\n".join(lines)


def as_record(found: Calibration) -> dict[str, Any]:
    """Return it as JSON can hold it; a rate that was not seen is None."""
    return {
        "num_workers": found.num_workers,
        "num_hosts": found.num_hosts,
        "latency_seconds": found.link.latency_seconds,
        "rate": found.link.rate if math.isfinite(found.link.rate) else None,
        "seconds": {str(nbytes): samples.seconds for nbytes, samples in found.samples.items()},
    }
