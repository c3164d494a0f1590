"""Predictions of the cost model for published neural networks on published clusters.

The figures of networks and clusters are taken from publications; ``docs/explanation/scaling.md``
cites them, and a test compares the tables of that page with these functions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dvkernels.benchmarks import network_calibration
from dvkernels.schedules.cost_model import Link

__all__ = [
    "CLUSTERS",
    "NETWORKS",
    "PUBLISHED",
    "RANKS",
    "efficiency",
    "network_ring_seconds",
    "reduce_seconds",
    "step_seconds",
    "tables",
]

RANKS = (8, 32, 128, 512)
# Assumed for all networks: the backward pass has two matrix products for each of the forward pass.
_BACKWARD_FRACTION = 2 / 3


class NeuralNetwork(NamedTuple):
    """Size and step time of a neural network on one device."""

    name: str
    num_parameters: int
    batch_size: int
    seconds: float  # of a step, on one device

    @property
    def nbytes(self) -> int:
        """The bytes of its gradient, in float32."""
        return 4 * self.num_parameters


class Cluster(NamedTuple):
    """Devices per host, and the links inside and between hosts."""

    name: str
    per_host: int
    between: Link  # between hosts
    inside: Link  # inside a host
    bucket_nbytes: int


class Published(NamedTuple):
    """A published scaling efficiency."""

    network: str
    cluster: str
    num_ranks: int
    efficiency: float
    by: str


# The latencies, and the rates inside a host, are assumptions: the publications do not give them.
CLUSTERS = {
    "pascal": Cluster(
        "4 P100 a host, 25 Gbit/s", 4, Link(10e-6, 25e9 / 8), Link(10e-6, 10e9), 64 << 20
    ),
    "volta": Cluster(
        "8 V100 a host, 4 x 100 Gbit/s", 8, Link(10e-6, 400e9 / 8), Link(10e-6, 60e9), 25 << 20
    ),
}
NETWORKS = {
    "pascal": (
        NeuralNetwork("Inception V3", 23_851_784, 64, 64 / 142),
        NeuralNetwork("ResNet-50", 25_557_032, 64, 64 / 219),
        NeuralNetwork("VGG-16", 138_357_544, 64, 64 / 154),
    ),
    "volta": (
        NeuralNetwork("ResNet-50", 25_557_032, 32, 0.097),
        NeuralNetwork("BERT-large", 340_000_000, 7, 7 / 7.56),
    ),
}
PUBLISHED = (
    Published("Inception V3", "pascal", 128, 0.90, "Horovod"),
    Published("Inception V3", "pascal", 512, 0.90, "Horovod"),
    Published("VGG-16", "pascal", 128, 0.79, "Horovod"),
    Published("VGG-16", "pascal", 512, 0.68, "Horovod"),
    Published("ResNet-50", "volta", 8, 0.097 / 0.104, "DDP"),
    Published("ResNet-50", "volta", 16, 0.097 / 0.104, "DDP"),
)
SCHEDULES = ("ring", "hierarchical")


def network_ring_seconds(link: Link, num_ranks: int, nbytes: int, num_buckets: int = 1) -> float:
    """Return the time of a ring all-reduce whose ranks all send to their neighbours at once.

    A host with several ranks has one link to the next host, so ``rate`` is that of the host.

    >>> network_ring_seconds(Link(0.0, 1e9), 4, 1_000_000_000)
    1.5
    """
    steps = 2 * (num_ranks - 1)
    return steps * (num_buckets * link.latency_seconds + nbytes / num_ranks / link.rate)


def step_seconds(compute_seconds: float, reduce_seconds: float, hidden_fraction: float) -> float:
    """Return the time of a training step that overlaps its reduction with its computation.

    ``hidden_fraction`` of the computation, at most that of the backward pass, overlaps with the
    reduction; the rest of the reduction is waited for.
    """
    hidden = hidden_fraction * compute_seconds
    return compute_seconds + max(0.0, reduce_seconds - hidden)


def reduce_seconds(
    network: NeuralNetwork, cluster: Cluster, num_ranks: int, schedule: str
) -> float:
    """Return the seconds to all-reduce a gradient, by one ring or hierarchically by hosts."""
    buckets = math.ceil(network.nbytes / cluster.bucket_nbytes)
    hosts = math.ceil(num_ranks / cluster.per_host)
    inside = network_ring_seconds(
        cluster.inside, min(num_ranks, cluster.per_host), network.nbytes, buckets
    )
    if hosts == 1:
        return inside
    ranks = num_ranks if schedule == "ring" else hosts
    between = network_ring_seconds(cluster.between, ranks, network.nbytes, buckets)
    return between if schedule == "ring" else inside + between


def efficiency(
    network: NeuralNetwork, cluster: Cluster, num_ranks: int, schedule: str, *, is_hidden: bool
) -> float:
    """Return the scaling efficiency: the fraction of ``num_ranks`` times one device's speed.

    With ``is_hidden`` the reduction overlaps with the whole backward pass, else with nothing.
    Measured efficiencies should lie between the two.
    """
    reduced = reduce_seconds(network, cluster, num_ranks, schedule)
    fraction = _BACKWARD_FRACTION if is_hidden else 0.0
    return network.seconds / step_seconds(network.seconds, reduced, fraction)


def tables(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the tables of the page in Markdown, from the JSON records of ``--calibrate``."""
    memory = [run for run in runs if run["num_hosts"] == 1]
    messages = [run for run in runs if run["num_hosts"] > 1]
    return {
        "constants": _constants(runs),
        "memory": _measured(memory),
        "messages": _measured(messages),
        "predictions": _predictions(),
        "published": _published(),
    }


def _constants(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [["processes", "over", "latency", "rate"]]
    for run in runs:
        over = "shared memory" if run["num_hosts"] == 1 else "messages"
        latency = f"{run['latency_seconds'] * 1e6:.0f} µs"
        rows.append([str(run["num_workers"]), over, latency, f"{run['rate'] / 1e9:.1f} GB/s"])
    return _markdown(rows)


def _measured(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the medians and their ratios to the model with the constants of the run."""
    rows = [["bytes", *(f"{run['num_workers']} processes | of model" for run in runs)]]
    for nbytes in runs[0]["seconds"]:
        cells = []
        for run in runs:
            seconds = statistics.median(run["seconds"][nbytes])
            link = Link(run["latency_seconds"], run["rate"])
            model = network_calibration.modelled(
                run["num_workers"], run["num_hosts"], link, int(nbytes)
            )
            cells.append(f"{_time(seconds)} | {seconds / model:.2f}")
        rows.append([_size(int(nbytes)), *cells])
    return _markdown(rows)


def _predictions() -> str:
    rows = [["network", "cluster", "schedule", *(f"{count} ranks" for count in RANKS)]]
    for key, cluster in CLUSTERS.items():
        for network in NETWORKS[key]:
            for schedule in SCHEDULES:
                cells = [_span(network, cluster, count, schedule) for count in RANKS]
                rows.append([network.name, cluster.name, schedule, *cells])
    return _markdown(rows)


def _published() -> str:
    rows = [["network", "ranks", "by", "published", "ring", "hierarchical"]]
    for result in PUBLISHED:
        cluster = CLUSTERS[result.cluster]
        network = next(each for each in NETWORKS[result.cluster] if each.name == result.network)
        spans = [_span(network, cluster, result.num_ranks, schedule) for schedule in SCHEDULES]
        rows.append(
            [
                result.network,
                str(result.num_ranks),
                result.by,
                f"{result.efficiency:.0%}",
                *spans,
            ]
        )
    return _markdown(rows)


def _span(network: NeuralNetwork, cluster: Cluster, num_ranks: int, schedule: str) -> str:
    low, high = (
        efficiency(network, cluster, num_ranks, schedule, is_hidden=hidden)
        for hidden in (False, True)
    )
    return f"{low:.0%} to {high:.0%}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _size(nbytes: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes // size} {unit}"
    return f"{nbytes} B"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *body])
