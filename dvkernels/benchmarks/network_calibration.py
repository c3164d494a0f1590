"""Calibration of the cost model between workers, from measured all-reduce times by size.

All workers of a job run it together; each time is that of the slowest worker.
Between hosts every algorithm is measured, and the constants of the network are fitted to all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dvkernels.benchmarks.stopwatch import Samples
from dvkernels.cluster.host_group import HostGroup
from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.communicators import registry
from dvkernels.communicators.base import Workers
from dvkernels.communicators.workers.mpi import network_model as network
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules import cost_model
from dvkernels.schedules.cost_model import Link, Network

__all__ = [
    "ALGORITHMS",
    "SIZES",
    "Calibration",
    "as_record",
    "calibrate",
    "describe",
    "fit",
    "fit_network",
    "modelled",
]

# From a single message over the sizes where pipelining starts to those bound by the network's rate.
SIZES = tuple(4 << k for k in (0, 8, 12, 14, 16, 18, 20, 22, 24))
ALGORITHMS = ("gather", "exchange", "ring")
_MOST_GATHERED = 4 << 20  # above, gather is slow and never chosen
_SECONDS_PER_ROUND = 0.02
_TIMEOUT_SECONDS = 120.0
_MOST_RATE = 1e12  # bytes/s; a higher fitted rate is noise


class Calibration(NamedTuple):
    """Measured times, and the constants fitted to them."""

    num_workers: int
    num_hosts: int
    link: Link
    samples: dict[int, Samples]  # by bytes, of the algorithm that the model chooses
    network: Network | None  # None on a single host
    by_algorithm: dict[str, dict[int, Samples]]  # by algorithm and bytes; empty on a single host


def calibrate(resolver: ClusterResolver, num_rounds: int) -> Calibration:
    """Measure between the workers of the job; collective over all of them."""
    if isinstance(resolver, HostGroup):
        group = registry.between_workers(resolver, _TIMEOUT_SECONDS)
        return _on_one_host(group.size, _measure({"auto": group}, num_rounds)["auto"])
    # Imported here: it loads MPI.
    from dvkernels.communicators.workers import connect

    workers: dict[str, Workers] = {"auto": connect.connect(resolver, _TIMEOUT_SECONDS)}
    placed = connect.hosts_of_workers(resolver)
    num_workers, num_hosts = len(placed), len({*placed})
    if num_hosts > 1:
        workers = {name: connect.connect(resolver, _TIMEOUT_SECONDS, name) for name in ALGORITHMS}
    found = _measure(workers, num_rounds)
    if num_hosts == 1:
        return _on_one_host(num_workers, found["auto"])
    samples = {
        nbytes: found[cost_model.between_hosts(cost_model.NETWORK, num_workers, num_hosts, nbytes)][
            nbytes
        ]
        for nbytes in SIZES
    }
    link = fit(num_workers, num_hosts, samples)
    fitted = fit_network(num_workers, num_hosts, found)
    return Calibration(num_workers, num_hosts, link, samples, fitted, found)


def _on_one_host(num_workers: int, samples: dict[int, Samples]) -> Calibration:
    return Calibration(num_workers, 1, fit(num_workers, 1, samples), samples, None, {})


def _measure(workers: Mapping[str, Workers], num_rounds: int) -> dict[str, dict[int, Samples]]:
    """Return the times by algorithm and bytes, measured in alternating rounds."""
    arrays = {nbytes: np.ones(nbytes // 4, np.float32) for nbytes in SIZES}
    cases = [
        (name, nbytes)
        for nbytes in SIZES
        for name in workers
        if name != "gather" or nbytes <= _MOST_GATHERED
    ]
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    calls = dict.fromkeys(cases, 1)
    for number in range(num_rounds + 1):
        for name, nbytes in cases:
            taken = _slowest(workers[name], arrays[nbytes], calls[name, nbytes])
            if number:
                seconds[name, nbytes].append(taken)
            else:  # a warm-up round, after which all workers choose the same number of calls
                calls[name, nbytes] = int(np.clip(_SECONDS_PER_ROUND / taken, 1, 2000))
    found: dict[str, dict[int, Samples]] = {name: {} for name in workers}
    for name, nbytes in cases:
        found[name][nbytes] = Samples(tuple(seconds[name, nbytes]))
    return found


def _slowest(workers: Workers, array: Any, count: int) -> float:
    """Return the seconds per call on the slowest worker."""
    out = np.empty_like(array)
    workers.all_reduce([array], ReduceOp.SUM, [out])
    workers.barrier()
    started = time.perf_counter()
    for _ in range(count):
        workers.all_reduce([array], ReduceOp.SUM, [out])
    seconds = (time.perf_counter() - started) / count
    return float(max(workers.exchange(seconds)))


def fit(num_workers: int, num_hosts: int, samples: Mapping[int, Samples]) -> Link:
    """Fit latency and rate by least squares of the relative errors; the rate may be infinite.

    The model is linear in the latency and in the seconds per byte.
    """

    def column(link: Link) -> Any:
        modeled = [modelled(num_workers, num_hosts, link, nbytes) for nbytes in samples]
        return np.array(modeled) / [each.median for each in samples.values()]

    latencies, moved = column(Link(1.0, np.inf)), column(Link(0.0, 1.0))
    both = np.column_stack([latencies, moved])
    latency, per_byte = np.linalg.lstsq(both, np.ones(len(samples)))[0]
    if latency <= 0 or per_byte <= 0:  # one is too small to be measured: fit the other alone
        kept, other = (latencies, moved) if per_byte <= 0 else (moved, latencies)
        alone = (kept @ np.ones(len(kept))) / (kept @ kept)
        latency, per_byte = (alone, 0.0) if other is moved else (0.0, alone)
    return Link(float(latency), float(1 / per_byte) if per_byte else math.inf)


def fit_network(
    num_workers: int, num_hosts: int, by_algorithm: Mapping[str, Mapping[int, Samples]]
) -> Network:
    """Fit the network to the times of all algorithms, by least squares of the relative errors.

    The model is linear in the three latencies, in the seconds per byte, and in the additional
    seconds per byte under incast. With two hosts ``hop_seconds`` and ``incast`` cannot be measured
    and keep their defaults. So does the memory rate.
    """
    known = Network(0.0, 0.0, 0.0, math.inf, 1.0, cost_model.NETWORK.memory_rate)
    cases = [(name, nbytes) for name, samples in by_algorithm.items() for nbytes in samples]
    measured = np.array([by_algorithm[name][nbytes].median for name, nbytes in cases])

    def modeled(network: Network) -> Any:
        return np.array(
            [
                cost_model.seconds_by_algorithm(network, num_workers, num_hosts, nbytes)[name]
                for name, nbytes in cases
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
    message, exchange, per_byte, *more = _nonnegative_lstsq(weighted, (measured - base) / measured)
    per_byte = max(per_byte, 1 / _MOST_RATE)
    found = cost_model.NETWORK._replace(
        message_seconds=message, exchange_seconds=exchange, rate=1 / per_byte
    )
    if not more:
        return found
    hop, incast_per_byte = more
    return found._replace(hop_seconds=hop, incast=per_byte / (per_byte + incast_per_byte))


def _nonnegative_lstsq(columns: Any, target: Any) -> list[float]:
    """Solve least squares; set negative coefficients to 0, the most negative one first."""
    kept = [*range(columns.shape[1])]
    while True:
        found = np.linalg.lstsq(columns[:, kept], target)[0]
        shares = found * np.abs(columns[:, kept]).max(0)
        if shares.min(initial=0.0) >= 0:
            break
        del kept[int(shares.argmin())]
    solution = np.zeros(columns.shape[1])
    solution[kept] = found
    return [float(value) for value in solution]


def modelled(num_workers: int, num_hosts: int, link: Link, nbytes: int) -> float:
    """Return the seconds of the cost model, over shared memory or between hosts."""
    if num_hosts == 1:
        return cost_model.memory_seconds(link, num_workers, nbytes)
    return cost_model.message_seconds(link, num_workers, num_hosts, nbytes)


def describe(found: Calibration) -> str:
    """Return a table of the constants, the measured times and the modelled times."""
    path = "in shared memory" if found.num_hosts == 1 else f"by messages of {found.num_hosts} hosts"
    lines = [
        f"{found.num_workers} workers {path}: latency "
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
        lines += ["", *_describe_algorithms(found, found.network)]
    return "\n".join(lines)


def _describe_algorithms(found: Calibration, fitted: Network) -> list[str]:
    """Return a table of each algorithm's times and the fitted model's choice, and the variable."""
    heads = "".join(f" {name:>13}" for name in ALGORITHMS)
    lines = [f"{'bytes':>10}{heads}   the model's choice"]
    for nbytes in SIZES:
        cells = (
            f"{samples[nbytes].median * 1e6:10.1f} us" if nbytes in samples else "-"
            for samples in (found.by_algorithm[name] for name in ALGORITHMS)
        )
        choice = cost_model.between_hosts(fitted, found.num_workers, found.num_hosts, nbytes)
        lines.append(f"{nbytes:10}" + "".join(f" {cell:>13}" for cell in cells) + f"   {choice}")
    return [
        *lines,
        "",
        "to make the model use these constants, set on every worker",
        f"{network.VARIABLE}={network.to_text(fitted)}",
    ]


def as_record(found: Calibration) -> dict[str, Any]:
    """Return a calibration as plain JSON values; an infinite rate is None."""
    return {
        "num_workers": found.num_workers,
        "num_hosts": found.num_hosts,
        "latency_seconds": found.link.latency_seconds,
        "rate": found.link.rate if math.isfinite(found.link.rate) else None,
        "seconds": _seconds(found.samples),
        "network": None if found.network is None else found.network._asdict(),
        "ways": {name: _seconds(samples) for name, samples in found.by_algorithm.items()},
    }


def _seconds(samples: Mapping[int, Samples]) -> dict[str, Any]:
    return {str(nbytes): each.seconds for nbytes, each in samples.items()}
