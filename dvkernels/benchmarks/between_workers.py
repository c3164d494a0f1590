"""How long an all-reduce between workers takes, by size, and the constants that the model needs.

Every worker of a job runs this, under ``mpiexec``; the times are those of the slowest one. Between
hosts each way is measured, and what describes the network to the model follows from all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dvkernels.benchmarks.stopwatch import Samples
from dvkernels.cluster.resolvers import ClusterResolver
from dvkernels.communicators.base import Workers
from dvkernels.communicators.workers.mpi import network_model as network
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules import cost_model
from dvkernels.schedules.cost_model import Link, Network

__all__ = [
    "SIZES",
    "WAYS",
    "Calibration",
    "as_record",
    "calibrate",
    "describe",
    "fit",
    "fit_network",
    "modelled",
]

# Where one message is enough, where pieces and parts begin, and what networks have.
SIZES = tuple(4 << k for k in (0, 8, 12, 14, 16, 18, 20, 22, 24))
WAYS = ("gather", "exchange", "ring")
_MOST_GATHERED = 4 << 20  # what is longer takes long, and goes another way anywhere
_SECONDS_PER_ROUND = 0.02
_TIMEOUT_SECONDS = 120.0
_MOST_RATE = 1e12  # what is faster is not seen


class Calibration(NamedTuple):
    """What was measured, and the constants that follow."""

    num_workers: int
    num_hosts: int
    link: Link
    samples: dict[int, Samples]  # by bytes, of the way that the model says
    network: Network | None  # between hosts
    ways: dict[str, dict[int, Samples]]  # by way and bytes, between hosts


def calibrate(resolver: ClusterResolver, num_rounds: int) -> Calibration:
    """Measure between the workers of the job; all of them call this."""
    # Loads MPI: not before somebody wants it.
    from dvkernels.communicators.workers import connect

    workers: dict[str, Workers] = {"auto": connect.connect(resolver, _TIMEOUT_SECONDS)}
    placed = connect.placed(resolver)
    num_workers, num_hosts = len(placed), len({*placed})
    if num_hosts > 1:
        workers = {way: connect.connect(resolver, _TIMEOUT_SECONDS, way) for way in WAYS}
    found = _measure(workers, num_rounds)
    if num_hosts == 1:
        samples = found["auto"]
        return Calibration(num_workers, 1, fit(num_workers, 1, samples), samples, None, {})
    samples = {
        nbytes: found[cost_model.between_hosts(cost_model.NETWORK, num_workers, num_hosts, nbytes)][
            nbytes
        ]
        for nbytes in SIZES
    }
    link = fit(num_workers, num_hosts, samples)
    fitted = fit_network(num_workers, num_hosts, found)
    return Calibration(num_workers, num_hosts, link, samples, fitted, found)


def _measure(workers: Mapping[str, Workers], num_rounds: int) -> dict[str, dict[int, Samples]]:
    """Return the times by way and bytes, measured in alternating rounds."""
    held = {nbytes: np.ones(nbytes // 4, np.float32) for nbytes in SIZES}
    cases = [
        (way, nbytes)
        for nbytes in SIZES
        for way in workers
        if way != "gather" or nbytes <= _MOST_GATHERED
    ]
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    calls = dict.fromkeys(cases, 1)
    for number in range(num_rounds + 1):
        for way, nbytes in cases:
            taken = _slowest(workers[way], held[nbytes], calls[way, nbytes])
            if number:
                seconds[way, nbytes].append(taken)
            else:  # warm, and all agree on how often
                calls[way, nbytes] = int(np.clip(_SECONDS_PER_ROUND / taken, 1, 2000))
    found: dict[str, dict[int, Samples]] = {way: {} for way in workers}
    for way, nbytes in cases:
        found[way][nbytes] = Samples(tuple(seconds[way, nbytes]))
    return found


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


def fit_network(
    num_workers: int, num_hosts: int, ways: Mapping[str, Mapping[int, Samples]]
) -> Network:
    """Return the network of the least squares of relative errors of all ways.

    The model is linear in the three times, in that of a byte, and in what a byte takes longer where
    several send at once. What two hosts cannot show is as it was measured before: ``hop_seconds``
    and ``incast``. So is the rate of memory, which is this machine's own.
    """
    known = Network(0.0, 0.0, 0.0, math.inf, 1.0, cost_model.NETWORK.memory_rate)
    cases = [(way, nbytes) for way, samples in ways.items() for nbytes in samples]
    measured = np.array([ways[way][nbytes].median for way, nbytes in cases])

    def modeled(given: Network) -> Any:
        return np.array(
            [
                cost_model.seconds_by_algorithm(given, num_workers, num_hosts, nbytes)[way]
                for way, nbytes in cases
            ]
        )

    base = modeled(known)
    of_bytes = modeled(known._replace(rate=1.0)) - base
    columns = [
        modeled(known._replace(message_seconds=1.0)) - base,
        modeled(known._replace(exchange_seconds=1.0)) - base,
        of_bytes,
    ]
    if num_hosts > 2:
        columns += [
            modeled(known._replace(hop_seconds=1.0)) - base,
            modeled(known._replace(rate=1.0, incast=0.5)) - base - of_bytes,
        ]
    weighted = np.column_stack(columns) / measured[:, None]
    message, exchange, per_byte, *more = _not_negative(weighted, (measured - base) / measured)
    per_byte = max(per_byte, 1 / _MOST_RATE)
    found = cost_model.NETWORK._replace(
        message_seconds=message, exchange_seconds=exchange, rate=1 / per_byte
    )
    if not more:
        return found
    hop, longer = more
    return found._replace(hop_seconds=hop, incast=per_byte / (per_byte + longer))


def _not_negative(columns: Any, wanted: Any) -> list[float]:
    """Return a solution of least squares; what would be negative is left out, the worst first."""
    kept = [*range(columns.shape[1])]
    while True:
        found = np.linalg.lstsq(columns[:, kept], wanted)[0]
        shares = found * np.abs(columns[:, kept]).max(0)
        if shares.min(initial=0.0) >= 0:
            break
        del kept[int(shares.argmin())]
    solution = np.zeros(columns.shape[1])
    solution[kept] = found
    return [float(one) for one in solution]


def modelled(num_workers: int, num_hosts: int, link: Link, nbytes: int) -> float:
    """Return the seconds that the model gives: over shared memory, or between hosts."""
    if num_hosts == 1:
        return cost_model.memory_seconds(link, num_workers, nbytes)
    return cost_model.message_seconds(link, num_workers, num_hosts, nbytes)


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
    if found.network is not None:
        lines += ["", *_described_ways(found, found.network)]
    return "\n".join(lines)


def _described_ways(found: Calibration, fitted: Network) -> list[str]:
    """Return what each way takes, which one the fitted model takes, and how to make it do so."""
    lines = [f"{'bytes':>10}" + "".join(f" {way:>13}" for way in WAYS) + "   the model's choice"]
    for nbytes in SIZES:
        cells = (
            f"{found.ways[way][nbytes].median * 1e6:10.1f} us" if nbytes in found.ways[way] else "-"
            for way in WAYS
        )
        choice = cost_model.between_hosts(fitted, found.num_workers, found.num_hosts, nbytes)
        lines.append(f"{nbytes:10}" + "".join(f" {cell:>13}" for cell in cells) + f"   {choice}")
    return [
        *lines,
        "",
        "to choose by these constants, set on every worker",
        f"{network.VARIABLE}={network.written(fitted)}",
    ]


def as_record(found: Calibration) -> dict[str, Any]:
    """Return it as JSON can hold it; a rate that was not seen is None."""
    return {
        "num_workers": found.num_workers,
        "num_hosts": found.num_hosts,
        "latency_seconds": found.link.latency_seconds,
        "rate": found.link.rate if math.isfinite(found.link.rate) else None,
        "seconds": _seconds(found.samples),
        "network": None if found.network is None else found.network._asdict(),
        "ways": {way: _seconds(samples) for way, samples in found.ways.items()},
    }


def _seconds(samples: Mapping[int, Samples]) -> dict[str, Any]:
    return {str(nbytes): one.seconds for nbytes, one in samples.items()}
