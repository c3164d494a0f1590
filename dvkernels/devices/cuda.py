"""CUDA devices of this process, the reason why there are none, and allocation of arrays on them.

The package allocates GPU memory through CuPy (cupy_arrays.py), or in the simulator's arrays
(simulated_arrays.py): ``testing.check_arrays`` checks both against the contract below.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any, Protocol

from dvkernels.devices import driver
from dvkernels.devices.array_spec import Array, HostArray
from dvkernels.devices.device import Device
from dvkernels.errors import DeviceError
from dvkernels.threads import shielded

__all__ = ["ArrayLibrary", "arrays", "devices", "is_simulated", "missing"]


class ArrayLibrary(Protocol):
    """Interface to the library that allocates arrays on CUDA devices."""

    def empty(
        self, device: int, shape: tuple[int, ...], dtype: Any, stream: int | None = None
    ) -> Array:
        """Return a new array on a device, with undefined elements.

        Its memory is ordered on ``stream`` (an address; None: the current stream): a later use of
        the memory by another array comes after the earlier work of that stream.
        """

    def copy(self, target: Array, source: Array, stream: Any = None) -> None:
        """Copy between the host and devices, in the order of ``stream``.

        The host waits only where its memory is pageable: NumPy arrays that are not pinned.
        """

    def stream(self, device: int, *, joins_default: bool = False) -> Any:
        """Return a new stream: ``with stream:`` makes it current, ``synchronize()`` waits for it.

        ``joins_default``: the stream and the device's default stream wait for each other.
        """

    def stream_at(self, device: int, address: int) -> Any:
        """Return a stream of any library, known by its address, as one of this library."""

    def event(self, device: int) -> Any:
        """Return a new event: ``record(stream)``, ``synchronize()``; ``stream.wait_event(it)``.

        Both are called inside ``at(device)``: a default stream is that of the current device.
        Its ``done`` says, without waiting, whether it has happened.
        """

    def identity(self, device: int) -> str:
        """Return an identifier of a device, unique and the same in every process."""

    def over(self, described: HostArray, device: int, owner: Array) -> Array:
        """Return an array over the memory of another library's array ``owner``, without a copy.

        ``described`` is its NumPy description (see cuda_arrays.py).
        """

    def device_of(self, array: Array) -> int:
        """Return the index of the device that an array lies on."""

    def current(self, device: int) -> Any:
        """Return this thread's current stream on a device; its address is ``ptr``.

        It is used inside ``at(device)``: the default stream is that of the current device.
        """

    def pinned(self, nbytes: int) -> HostArray:
        """Return bytes in pinned host memory, from which copies on a stream are asynchronous.

        They begin at a page boundary, and must not change before a copy from them has ended.
        """

    def at(self, device: int, stream: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that makes a device, and a stream of it, current."""

    def to_host(self, array: Array) -> HostArray:
        """Return a copy in host memory; the host waits for it."""

    def read_only(self, array: Array) -> Array:
        """Return a read-only view; CuPy has no read-only arrays, so its view is writable."""

    def is_writable(self, array: Array) -> bool:
        """Return whether an array is writable."""

    def overwrite(
        self, device: int, stream: int, targets: Sequence[Array], sources: Sequence[Array]
    ) -> None:
        """Copy contiguous arrays to contiguous arrays, one after another, on a stream of a device.

        No interrupt comes between two of the copies.
        """


def is_simulated() -> bool:
    """Return whether this process uses Numba's CUDA simulator instead of a GPU."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def devices() -> list[Device]:
    """Return the CUDA devices visible to this process: none where there is no driver.

    ``CUDA_VISIBLE_DEVICES`` selects them; their indices count from 0 in its order.
    """
    return [Device("cuda", index) for index in range(_count())]


def _count() -> int:
    if is_simulated():
        return simulated_count(os.environ.get("CUDA_VISIBLE_DEVICES"))
    cuda_driver = driver.find()
    return 0 if cuda_driver is None else cuda_driver.count()


def simulated_count(visible: str | None) -> int:
    """Return the number of simulated devices: one, unless ``CUDA_VISIBLE_DEVICES`` hides it."""
    return int(visible is None or visible.split(",")[0].strip() == "0")


def missing() -> str:
    """Return the reason why kernels cannot run on GPUs here, with a remedy; "" where they can."""
    if is_simulated():
        return "" if _count() else "CUDA_VISIBLE_DEVICES hides the simulated device: unset it"
    cuda_driver = driver.find()
    if cuda_driver is None:
        return explain(None, "", 0, ())
    if cuda_driver.is_inherited:
        return (
            "this process was forked from one that already used the GPU, and the driver serves "
            "only that process: start processes with the method 'spawn' or 'forkserver'"
        )
    return _missing_packages(cuda_driver)


@functools.cache
def _missing_packages(cuda_driver: driver.Driver) -> str:
    """Return what is missing besides a driver; computed once, as it does not change."""
    version = None if cuda_driver.problem else cuda_driver.version()
    return explain(version, cuda_driver.problem, cuda_driver.count(), _installed())


_PACKAGES = ("numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "cupy")


@functools.cache
def _installed() -> tuple[str, ...]:
    """Return the installed packages among those that a GPU, or a compiler for it, needs."""
    from importlib import metadata  # 15 ms, and only where there is a driver

    installed = []
    for name in _PACKAGES:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        installed.append(name)
    return tuple(installed)


def explain(
    version: tuple[int, int] | None, problem: str, count: int, installed: tuple[str, ...]
) -> str:
    """Return what is missing and the remedy, or "".

    ``version`` is the CUDA version of the driver, None where there is none or it fails to start;
    ``problem`` its error on initialization, or ""; ``count`` the number of visible devices.
    """
    if problem:
        return f"the NVIDIA driver does not start ({problem}): check that nvidia-smi works"
    if version is None:
        return (
            "no NVIDIA driver was found (libcuda.so.1): install one, "
            "and check that nvidia-smi works"
        )
    if count == 0:
        return "the NVIDIA driver sees no device: is CUDA_VISIBLE_DEVICES empty?"
    runs = f"the driver runs CUDA {version[0]}.{version[1]}"
    install = install_command(version)
    if version[0] < 12:
        return f"{runs}, and CUDA 12 or later is needed: update the NVIDIA driver"
    if version[0] < 13 and "cupy-cuda13x" in installed and "cupy-cuda12x" not in installed:
        return (
            f"{runs}, and the packages here are for CUDA 13: python -m pip uninstall cupy-cuda13x, "
            f"then {install}, or update the driver"
        )
    if not any(name.startswith("cupy") for name in installed):
        return f"CuPy is not installed; {runs}: {install}"
    return ""


def install_command(version: tuple[int, int] | None = None) -> str:
    """Return the command that installs what GPUs need; ``version`` None: for the driver here."""
    if version is None:
        cuda_driver = driver.find()
        version = (13, 0) if cuda_driver is None or cuda_driver.problem else cuda_driver.version()
    return f"python -m pip install 'dvkernels[{'cuda13' if version[0] >= 13 else 'cuda12'}]'"


def require(verb: str) -> None:
    """Raise :class:`DeviceError` unless kernels can run on a GPU here."""
    problem = missing()
    if problem:
        raise DeviceError(f"{verb}: {problem}")


def require_compiler(what: str) -> None:
    """Raise :class:`DeviceError` unless there is a compiler for GPUs, which ``what`` needs."""
    if "numba-cuda" not in _installed():
        raise DeviceError(
            f"{what} has to be compiled for GPUs, and numba-cuda is not installed: "
            f"{install_command()}"
        )


@functools.cache
def arrays() -> ArrayLibrary:
    """Return the array library of this process: CuPy's twin, or the simulator's."""
    require("arrays on a GPU")
    return shielded.beyond_interrupts(_import_arrays)


def _import_arrays() -> ArrayLibrary:
    """Import CuPy, or Numba's simulator, and return its array library."""
    if is_simulated():
        from numba import cuda

        from dvkernels.devices.simulated_arrays import SimulatedArrays

        untyped: Any = cuda
        return SimulatedArrays(type(untyped.device_array(1)))
    from dvkernels.devices.cupy_arrays import CuPyArrays

    return CuPyArrays()


class _OnStream:
    """CuPy array that names the stream of the work on it in its array interface.

    CuPy names its current stream, on which the work need not be.
    """

    def __init__(self, array: Any, stream: int) -> None:
        self._array = array
        # The interface calls the default stream 1.
        interface = {**array.__cuda_array_interface__, "version": 3, "stream": stream or 1}
        self.__cuda_array_interface__ = interface


def as_numba(array: Any, device: int, stream: int) -> Any:
    """Return a CuPy array as a Numba device array on a stream, without a copy or a wait."""
    from numba import cuda

    untyped: Any = cuda
    with untyped.gpus[device]:
        return untyped.as_cuda_array(_OnStream(array, stream), sync=False)
