"""Registry of device kinds: lists the devices of this machine and resolves names to devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np

from dvkernels.devices import cpu, cuda, jax_devices
from dvkernels.devices.device import Device
from dvkernels.errors import DeviceError

__all__ = ["list_devices"]


def _cpu_devices() -> list[Device]:
    return [Device("cpu", index) for index in range(cpu.usable_cores())]


def _jax_devices(platform: str) -> list[Device]:
    return jax_devices.listed(platform)


_KINDS: dict[str, Callable[[], list[Device]]] = {
    "cpu": _cpu_devices,
    "cuda": cuda.devices,
    "jax:cpu": functools.partial(_jax_devices, "cpu"),
    "jax:tpu": functools.partial(_jax_devices, "tpu"),
}


def list_devices(kind: str | None = None) -> list[Device]:
    """Return the devices of this machine, of one kind or of all.

    Parameters
    ----------
    kind : str, optional
        ``"cpu"``: one logical device per core that this process may use (affinity and cgroup
        quota; under a launcher, its share of them). More may be named: every ``"cpu:k"`` exists.
        ``"cuda"``: the GPUs that ``CUDA_VISIBLE_DEVICES`` makes visible to this process, none
        where there is no driver. ``"jax:tpu"``, ``"jax:cpu"``: the devices of JAX, which are
        listed only if they are asked for, since JAX starts its backends then.

    Raises
    ------
    DeviceError
        There is no such kind; JAX is not installed, or has no such backend.

    Examples
    --------
    >>> import dvkernels as dv
    >>> print(dv.list_devices("cpu")[0])
    cpu:0
    """
    if kind is None:
        return [*_cpu_devices(), *cuda.devices()]
    if kind not in _KINDS:
        raise DeviceError(f"no devices of kind {kind!r}; the kinds here are {sorted(_KINDS)}")
    return _KINDS[kind]()


def resolve(device: object) -> Device:
    """Return the device that ``device`` is or names; raise ``DeviceError`` unless it exists."""
    if isinstance(device, str):
        try:
            device = Device.parse(device)
        except DeviceError as error:
            raise DeviceError(f"{error}; {_available()}") from None
    if not isinstance(device, Device):
        raise DeviceError(
            f'expected a device or a name such as "cpu:0", got {device!r} of type '
            f"{type(device).__name__}; {_available()}"
        )
    if device.kind not in _KINDS:
        raise DeviceError(f"there is no device {device}; {_available()}")
    if device.kind == "cuda":
        reason = cuda.missing()
        if reason or device not in cuda.devices():
            raise DeviceError(f"{reason or f'there is no device {device}'}; {_available()}")
    if device.kind.startswith("jax:"):
        found = _KINDS[device.kind]()
        if device not in found:
            raise DeviceError(
                f"there is no device {device}; those of JAX here are {', '.join(map(str, found))}"
            )
    return device


def resolve_all(devices: object) -> tuple[Device, ...]:
    """Return the devices of a sequence of devices or names, or so many CPU devices.

    None means all GPUs, or else all cores.

    GPUs count only where kernels can run on them, which takes more than a driver.
    """
    if devices is None:
        gpus = [] if cuda.missing() else cuda.devices()
        return tuple(gpus or _cpu_devices())
    if isinstance(devices, (int, np.integer)) and not isinstance(devices, bool) and devices > 0:
        return tuple(Device("cpu", index) for index in range(int(devices)))
    if isinstance(devices, (str, Device)) or not isinstance(devices, Iterable):
        raise DeviceError(
            f"expected a list of devices such as ['cpu:0', 'cpu:1'], or a positive number of CPU "
            f"replicas, got {devices!r}; "
            f"{_available()}"
        )
    resolved = tuple(resolve(device) for device in devices)
    if not resolved:
        raise DeviceError(f"expected at least one device, got an empty list; {_available()}")
    return resolved


def _available() -> str:
    names = ", ".join(str(device) for device in list_devices())
    return f"the devices here are {names} (any cpu:k is allowed)"
