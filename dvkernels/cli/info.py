"""``python -m dvkernels info``: compute something on every device and say whether it worked."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

import numpy as np

from dvkernels import context
from dvkernels._version import __version__
from dvkernels.devices import cuda
from dvkernels.devices.base import Device
from dvkernels.devices.registry import list_devices
from dvkernels.strategies.mirrored import MirroredStrategy

__all__: list[str] = []

HELP = "compute something on every device and say PASS or why not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no options: there are none."""


def run(arguments: argparse.Namespace) -> int:
    """Print versions, then one line per device and one for all together; 1 if any failed."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("numpy", "numba", "optree"))
    print(f"dvkernels {__version__}, Python {platform.python_version()}, {packages}")
    print(f"{platform.system()} {platform.machine()}")
    devices = list_devices("cpu")
    outcomes = [_check([device]) for device in devices]
    for device, outcome in zip(devices, outcomes, strict=True):
        print(f"{device!s:8} {outcome}")
    together = _check([Device("cpu", k) for k in range(max(2, len(devices)))])
    print(f"{'together':8} {together}")
    found = ", ".join(map(str, list_devices("cuda")))
    print(f"cuda     {cuda.missing() or f'{found}: kernels only, strategies do not run there yet'}")
    return 0 if all(outcome == "PASS" for outcome in (*outcomes, together)) else 1


def _check(devices: list[Device]) -> str:
    """All-reduce random integers over the devices, by both algorithms, and compare with NumPy."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(-1000, 1000, (len(devices), 100_003))
    expected = inputs.sum(axis=0)
    try:
        for algorithm in ("direct", "ring"):
            with MirroredStrategy(devices, cross_device_ops=algorithm) as strategy:

                def reduce_own() -> object:
                    replica = context.get_replica_context()
                    assert replica is not None
                    return replica.all_reduce("sum", inputs[replica.replica_id_in_sync_group])

                for result in strategy.run(reduce_own).values:
                    if not np.array_equal(result, expected):
                        return f"FAIL: the {algorithm} all-reduce gave a wrong sum"
    except Exception as error:
        return f"FAIL: {type(error).__name__}: {error}"
    return "PASS"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
