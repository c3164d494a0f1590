"""Devices of JAX: their names here, their meshes, and the default device of each replica's thread.

JAX is imported by the modules named for it only, which are imported once a device of JAX is named.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dvkernels.devices.device import Device
from dvkernels.errors import DeviceError
from dvkernels.threads import shielded
from dvkernels.user_errors import text_of

__all__ = ["AXIS", "DefaultDevices"]

AXIS = "replicas"  # the only axis of a mesh


@functools.cache
def _jax() -> Any:
    """Return JAX, imported on a thread that no interrupt reaches."""
    import importlib

    try:
        return shielded.beyond_interrupts(importlib.import_module, "jax")
    except ImportError as error:
        raise DeviceError(
            f"devices of JAX need the package jax, which cannot be imported: {text_of(error)}; "
            f"install it (pip install 'dvkernels[jax]')"
        ) from error


@functools.cache
def _found(platform: str) -> tuple[Any, ...]:
    """Return the devices of a platform that belong to this process; JAX starts its backends."""
    try:
        return tuple(_jax().local_devices(backend=platform))
    except RuntimeError as error:
        raise DeviceError(
            f"JAX has no backend {platform!r} here: {text_of(error)}; use 'jax:cpu:0', or a "
            f"machine that has such devices"
        ) from error


def listed(platform: str) -> list[Device]:
    """Return the devices of a platform of JAX, those of this process."""
    return [Device(f"jax:{platform}", index) for index in range(len(_found(platform)))]


def own(device: Device) -> Any:
    """Return the device of JAX that a device names."""
    return _found(device.kind.partition(":")[2])[device.index]


def num_processes() -> int:
    """Return the number of processes of ``jax.distributed``; 1 without it."""
    return int(_jax().process_count())


def mesh(
    devices: Sequence[Device], exchange: Callable[[Any], list[Any]] = lambda own: [own]
) -> Any:
    """Return the mesh of all replicas, worker by worker; each must have a device of its own.

    ``exchange`` returns the messages of all workers, each of which calls this with its own devices.
    """
    if len(set(devices)) < len(devices):
        named = ", ".join(map(str, devices))
        raise DeviceError(
            f"each replica over JAX needs a device of its own, and some of these are equal: "
            f"{named}; on CPUs, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 devices"
        )
    platform = devices[0].kind.partition(":")[2]
    numbers = exchange([own(device).id for device in devices])
    return _mesh(platform, tuple(number for each in numbers for number in each))


@functools.cache
def _mesh(platform: str, numbers: tuple[int, ...]) -> Any:
    found = {device.id: device for device in _jax().devices(platform)}
    return _jax().sharding.Mesh(np.array([found[number] for number in numbers]), (AXIS,))


@functools.cache
def replicated(mesh: Any) -> Any:
    """Return the sharding of an array with a whole copy on each device.

    The copies may differ as long as nobody but a ``shard_map`` with ``check_vma=False`` sees them.
    """
    sharding = _jax().sharding
    return sharding.NamedSharding(mesh, sharding.PartitionSpec())


class DefaultDevices:
    """Default devices of JAX in the threads of replicas, in the place of a ``StreamOrder``.

    JAX orders its work by the arrays that it takes, so nothing else is left to order.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = [own(device) for device in devices]

    def step(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager of a step, which does nothing."""
        return contextlib.nullcontext()

    def exchange(self) -> None:
        """Do nothing."""

    def replica(self, rank: int) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager under which new arrays lie on a replica's device."""
        manager: contextlib.AbstractContextManager[Any] = _jax().default_device(self._devices[rank])
        return manager

    def finish(self, rank: int) -> None:
        """Do nothing: nobody could wait for the work of one device without its arrays."""

    def meet(self, act: Callable[[Any], Any], payloads: Any) -> Any:
        """Return ``act(payloads)``."""
        return act(payloads)


@contextlib.contextmanager
def outside_traces() -> Iterator[None]:
    """Compute at once what is inside ``with``, though JAX may trace the code around it."""
    with _jax().ensure_compile_time_eval():
        yield
