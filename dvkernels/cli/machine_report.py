"""Versions and devices of this machine, and a check of the all-reduce on each device."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import numpy as np

from dvkernels import replica_context
from dvkernels._version import __version__
from dvkernels.cluster import simulated_hosts
from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.devices import array_memory, cpu, cuda
from dvkernels.devices.device import Device
from dvkernels.devices.registry import list_devices
from dvkernels.kernels import compile_cache, threading_layer
from dvkernels.kernels.cuda.engine import shipped_ptx
from dvkernels.replicas import thread_limits
from dvkernels.strategies.mirrored import MirroredStrategy

__all__: list[str] = []


def worker_report(resolver: ClusterResolver) -> dict[str, Any]:
    """Return the position of a worker, its devices, and the outcome of a check."""
    devices = list_devices("cpu")
    outcome = _check(devices)
    return {
        "place": _position(resolver),
        "devices": {str(device): outcome for device in devices},
        "together": outcome,
    }


def machine_report() -> dict[str, Any]:
    """Return the versions and devices of this machine, and the outcome of each check."""
    devices = list_devices("cpu")
    missing = cuda.missing()
    gpus = [] if missing else list_devices("cuda")
    outcomes = {str(device): _check([device]) for device in devices}
    outcomes |= {str(gpu): _check([gpu, gpu]) for gpu in gpus}  # two replicas that share it
    if len(gpus) > 1:
        outcomes["all GPUs"] = _check(gpus)
    num_replicas = max(2, len(devices))
    together = _check([Device("cpu", k) for k in range(num_replicas)])
    return {
        "dvkernels": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("numpy", "numba", "optree")},
        "system": f"{platform.system()} {platform.machine()}",
        "interpreter_lock": getattr(sys, "_is_gil_enabled", lambda: True)(),
        # Of users' parallel functions; the kernels have threads of their own.
        "threading_layer": threading_layer.layer(),
        "compiled_code": compile_cache.describe(),
        "devices": outcomes,
        "together": together,
        # Of BLAS and OpenMP; with threadpoolctl, replicas hold them to their share.
        "threads": {
            "cores": cpu.usable_cores(),
            "replicas": num_replicas,
            "share": thread_limits.share_of(num_replicas),
            "libraries": thread_limits.threads_by_library(),
        },
        "cuda": missing or ("simulated" if cuda.is_simulated() else "found"),
        "cuda_kernels": shipped_ptx.described(),
    }


def _position(resolver: ClusterResolver) -> str:
    """Return a worker's position: ``worker 3 of 4, 1 of 2 on n2, cores 4-7 (Open MPI)``.

    With simulated hosts also the worker's host: ``1 of 4 on n2, as if on host 1 of 2``.
    """
    worker = f"{resolver.task_type} {resolver.task_id}"
    if resolver.worker_id is not None:
        worker = f"worker {resolver.worker_id} of {resolver.num_workers}"
    node = platform.node()
    location = f"on {node}"
    if resolver.num_local_workers is not None:
        location = f"{resolver.local_rank} of {resolver.num_local_workers} on {node}"
    hosts = simulated_hosts.host_of_each_worker(os.environ, resolver.num_workers)
    if hosts is not None and resolver.worker_id is not None:
        location += f", as if on host {hosts[resolver.worker_id]} of {hosts[-1] + 1}"
    return f"{worker}, {location}, {cpu.described_affinity()} ({resolver.source})"


def _check(devices: list[Device]) -> str:
    """All-reduce random integers over the devices, by both algorithms, and compare with NumPy."""
    rng = np.random.default_rng(0)
    length = 103 if cuda.is_simulated() else 100_003  # the simulator runs one thread at a time
    inputs = rng.integers(-1000, 1000, (len(devices), length))
    expected = inputs.sum(axis=0)
    try:
        for algorithm in ("direct", "ring"):
            # The threads of BLAS have a line of their own: no warning about them.
            with MirroredStrategy(devices, cross_device_ops=algorithm, threads="all") as strategy:

                def reduce_own() -> object:
                    replica = replica_context.get_replica_context()
                    assert replica is not None
                    own = inputs[replica.replica_id_in_sync_group]
                    return replica.all_reduce("sum", array_memory.on_device(own, replica.device))

                for result in strategy.run(reduce_own).values:
                    if not np.array_equal(
                        array_memory.on_device(result, Device("cpu", 0)), expected
                    ):
                        return f"FAIL: the {algorithm} all-reduce gave a wrong sum"
    except Exception as error:
        return f"FAIL: {type(error).__name__}: {error}"
    return "PASS"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
