"""How long an all-reduce between workers takes, by size, and the constants that the model needs.

Every worker of a job runs this, under ``mpiexec``; the times are those of the slowest one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dvkernels.benchmarks.stopwatch import Samples
from dvkernels.cluster.resolvers import ClusterResolver
from dvkernels.communicators.base import Workers
from dvkernels.communicators.room import PLACE_NBYTES
from dvkernels.devices import cpu
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules import cost
from dvkernels.schedules.cost import Link

__all__ = ["SIZES", "Calibration", "as_record", "calibrate", "describe", "fit", "modelled"]

# Where one message is enough, where pieces and parts begin, and what networks have.
SIZES = tuple(4 << k for k in (0, 8, 12, 14, 16, 18, 20, 22, 24))
_SECONDS_PER_ROUND = 0.02
_TIMEOUT_SECONDS = 120.0
_CHANNEL = {
    "memory": "over memory that the workers of one host share",
    "messages": "by messages of MPI",
}


class Calibration(NamedTuple):
    """What was measured over one transport, and the constants that follow."""

    num_workers: int
    cores_per_worker: float
    link: Link
    samples: dict[int, Samples]  # by bytes


def calibrate(resolver: ClusterResolver, num_rounds: int) -> dict[str, Calibration]:
    """Measure over every transport that these workers have; all of them call this."""
    return {name: _measure(name, group, num_rounds) for name, group in _groups(resolver).items()}


def _groups(resolver: ClusterResolver) -> dict[str, Workers]:
    # Loads MPI: not before somebody wants it.
    from mpi4py import MPI

    from dvkernels.communicators import mpi
    from dvkernels.communicators.workers import WorkerGroup

    default = mpi.connect(resolver, _TIMEOUT_SECONDS)
    groups: dict[str, Workers] = {
        "messages": WorkerGroup(mpi.over_messages(MPI.COMM_WORLD, _TIMEOUT_SECONDS))
    }
    on_this_host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    if on_this_host.size == resolver.num_workers:
        groups = {"memory": default} | groups
    on_this_host.Free()
    return groups


def _measure(name: str, workers: Workers, num_rounds: int) -> Calibration:
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
    cores = cpu.usable_cores() if workers.size == 1 else _cores_of_all(workers) / workers.size
    return Calibration(workers.size, cores, fit(name, workers.size, cores, found), found)


def _cores_of_all(workers: Workers) -> int:
    """Return how many cores the workers have together, on hosts that are alike."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    every = {core for theirs in workers.exchange(mine) for core in theirs}
    return len(every) or os.cpu_count() or 1


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


def fit(name: str, num_workers: int, cores: float, samples: Mapping[int, Samples]) -> Link:
    """Return the constants of the least squares of relative errors; the rate may be infinite.

    The model is linear in the latency and in the time of a byte.
    """

    def column(link: Link) -> Any:
        modeled = [modelled(name, num_workers, cores, link, nbytes) for nbytes in samples]
        return np.array(modeled) / [one.median for one in samples.values()]

    latencies, moved = column(Link(1.0, np.inf)), column(Link(0.0, 1.0))
    both = np.column_stack([latencies, moved])
    latency, per_byte = np.linalg.lstsq(both, np.ones(len(samples)))[0]
    if latency <= 0 or per_byte <= 0:  # one of them is not seen beside the other
        kept, other = (latencies, moved) if per_byte <= 0 else (moved, latencies)
        alone = (kept @ np.ones(len(kept))) / (kept @ kept)
        latency, per_byte = (alone, 0.0) if other is moved else (0.0, alone)
    return Link(float(latency), float(1 / per_byte) if per_byte else math.inf)


def modelled(name: str, num_workers: int, cores: float, link: Link, nbytes: int) -> float:
    """Return the seconds that the model gives for a transport."""
    if name == "memory":
        return cost.memory_seconds(link, num_workers, nbytes, PLACE_NBYTES, cores)
    return cost.message_seconds(link, num_workers, nbytes)


def describe(found: Mapping[str, Calibration]) -> str:
    """Return the constants, and each time beside what the model makes of them."""
    lines: list[str] = []
    for name, one in found.items():
        lines += [
            f"{one.num_workers} workers {_CHANNEL[name]}: latency "
            f"{one.link.latency_seconds * 1e6:.2f} us, rate {one.link.rate / 1e9:.2f} GB/s",
            f"{'bytes':>10} {'measured':>10} {'quartiles':>21} {'model':>10}",
        ]
        for nbytes, samples in one.samples.items():
            model = modelled(name, one.num_workers, one.cores_per_worker, one.link, nbytes)
            low, high = samples.quartiles
            lines.append(
                f"{nbytes:10} {samples.median * 1e6:7.1f} us {low * 1e6:8.1f} to "
                f"{high * 1e6:7.1f} us {model * 1e6:7.1f} us"
            )
    return "\n".join(lines)


def as_record(found: Mapping[str, Calibration]) -> dict[str, Any]:
    """Return it as JSON can hold it."""
    return {
        name: {
            "num_workers": one.num_workers,
            "cores_per_worker": one.cores_per_worker,
            "latency_seconds": one.link.latency_seconds,
            "rate": one.link.rate if math.isfinite(one.link.rate) else None,
            "seconds": {str(nbytes): samples.seconds for nbytes, samples in one.samples.items()},
        }
        for name, one in found.items()
    }
