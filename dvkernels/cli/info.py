"""``python -m dvkernels info``: compute something on every device and say whether it worked."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata

import numpy as np

from dvkernels import context
from dvkernels._version import __version__
from dvkernels.cluster import hosts
from dvkernels.cluster.resolvers import ClusterResolver, default_resolver
from dvkernels.communicators import awareness
from dvkernels.devices import cpu, cuda, memory
from dvkernels.devices.base import Device
from dvkernels.devices.registry import list_devices
from dvkernels.errors import ClusterError
from dvkernels.kernels import cache, parallel
from dvkernels.strategies.mirrored import MirroredStrategy

__all__: list[str] = []

HELP = "compute something on every device and say PASS or why not; under launch, who is where"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no options: there are none."""


def run(arguments: argparse.Namespace) -> int:
    """Print versions, then one line per device and one for all together; 1 if any failed.

    Of several workers each prints one line, who and where it is, what it has, and what came of it,
    and then whether its MPI takes memory of GPUs: one that does not start ends it there.
    """
    resolver = default_resolver()
    devices = list_devices("cpu")
    if resolver.num_workers > 1:
        outcome = _check(devices)
        print(f"{_place(resolver)}: {' '.join(map(str, devices))} {outcome}", flush=True)
        print(_mpi())
        return 0 if outcome == "PASS" else 1
    packages = ", ".join(f"{name} {_version(name)}" for name in ("numpy", "numba", "optree"))
    print(f"dvkernels {__version__}, Python {platform.python_version()}, {packages}")
    print(f"{platform.system()} {platform.machine()}, {_interpreter_lock()}, {_threading_layer()}")
    print(f"compiled code: {cache.describe()}")
    outcomes = [_check([device]) for device in devices]
    for device, outcome in zip(devices, outcomes, strict=True):
        print(f"{device!s:8} {outcome}")
    together = _check([Device("cpu", k) for k in range(max(2, len(devices)))])
    print(f"{'together':8} {together}")
    missing = cuda.missing()
    gpus = [] if missing else list_devices("cuda")
    if missing:
        print(f"{'cuda':8} {missing}")
    for device in gpus:
        outcomes.append(_check([device, device]))  # two replicas that share it
        print(f"{device!s:8} {outcomes[-1]}{' in the simulator' * cuda.is_simulated()}")
    if len(gpus) > 1:
        outcomes.append(_check(gpus))
        print(f"{'all GPUs':8} {outcomes[-1]}")
    return 0 if all(outcome == "PASS" for outcome in (*outcomes, together)) else 1


def _interpreter_lock() -> str:
    is_on = getattr(sys, "_is_gil_enabled", lambda: True)()
    return f"interpreter lock {'on' if is_on else 'off'}"


def _threading_layer() -> str:
    """Return which layer parallel functions of users will have; kernels have their own threads."""
    return f"Numba's threading layer {parallel.layer()}"


def _place(resolver: ClusterResolver) -> str:
    """Return where a worker is: ``worker 3 of 4, 1 of 2 on n2, cores 4-7 (Open MPI)``.

    And which host it pretends to be on, if it does: ``1 of 4 on n2, as if on host 1 of 2``.
    """
    me = f"{resolver.task_type} {resolver.task_id}"
    if resolver.worker_id is not None:
        me = f"worker {resolver.worker_id} of {resolver.num_workers}"
    host = platform.node()
    here = f"on {host}"
    if resolver.num_local_workers is not None:
        here = f"{resolver.local_rank} of {resolver.num_local_workers} on {host}"
    pretended = hosts.pretended(os.environ, resolver.num_workers)
    if pretended is not None and resolver.worker_id is not None:
        here += f", as if on host {pretended[resolver.worker_id]} of {pretended[-1] + 1}"
    return f"{me}, {here}, {cpu.described_affinity()} ({resolver.source})"


def _mpi() -> str:
    """Return whether the MPI of this worker takes memory of GPUs, and who says so."""
    try:
        return f"MPI {awareness.of_mpi()}"
    except (ImportError, ClusterError) as error:
        return f"MPI cannot be asked: {error}"


def _check(devices: list[Device]) -> str:
    """All-reduce random integers over the devices, by both algorithms, and compare with NumPy."""
    rng = np.random.default_rng(0)
    length = 103 if cuda.is_simulated() else 100_003  # the simulator takes them one by one
    inputs = rng.integers(-1000, 1000, (len(devices), length))
    expected = inputs.sum(axis=0)
    try:
        for algorithm in ("direct", "ring"):
            with MirroredStrategy(devices, cross_device_ops=algorithm) as strategy:

                def reduce_own() -> object:
                    replica = context.get_replica_context()
                    assert replica is not None
                    own = inputs[replica.replica_id_in_sync_group]
                    return replica.all_reduce("sum", memory.brought(own, replica.device))

                for result in strategy.run(reduce_own).values:
                    if not np.array_equal(memory.brought(result, Device("cpu", 0)), expected):
                        return f"FAIL: the {algorithm} all-reduce gave a wrong sum"
    except Exception as error:
        return f"FAIL: {type(error).__name__}: {error}"
    return "PASS"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
