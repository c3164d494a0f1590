"""CUDA devices of this process, the reason why there are none, and allocation of arrays on them.

The package allocates GPU memory through CuPy. Kernels need the four functions ``empty``, ``copy``,
``stream`` and ``event``; strategies, whose variables are CuPy arrays, a few more. A twin has the
same functions over the arrays of Numba's simulator: ``testing.check_arrays`` checks both against
one contract.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import os
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np

from dvkernels.devices import driver
from dvkernels.devices.device import Device
from dvkernels.errors import DeviceError
from dvkernels.threads import shielded

__all__ = ["ArrayLibrary", "arrays", "devices", "is_simulated", "missing"]


class ArrayLibrary(Protocol):
    """Interface to the library that allocates arrays on CUDA devices."""

    def empty(
        self, device: int, shape: tuple[int, ...], dtype: Any, stream: int | None = None
    ) -> Any:
        """Return a new array on a device, with undefined elements.

        Its memory is ordered on ``stream`` (an address; None: the current stream): a later use of
        the memory by another array comes after the earlier work of that stream.
        """

    def copy(self, target: Any, source: Any, stream: Any = None) -> None:
        """Copy between the host and devices, in the order of ``stream``.

        The host waits only where its memory is pageable: NumPy arrays that are not pinned.
        """

    def stream(self, device: int, *, joins_default: bool = False) -> Any:
        """Return a new stream: ``with stream:`` makes it current, ``synchronize()`` waits for it.

        ``joins_default``: the stream and the device's default stream wait for each other.
        """

    def event(self, device: int) -> Any:
        """Return a new event: ``record(stream)``, ``synchronize()``; ``stream.wait_event(it)``.

        Its ``done`` says, without waiting, whether it has happened.
        """

    def identity(self, device: int) -> str:
        """Return an identifier of a device, unique and the same in every process."""

    def over(
        self,
        memory: tuple[int, int],
        address: int,
        described: Any,
        device: int,
        owner: Any,
    ) -> Any:
        """Return an array over the memory of another library's array ``owner``, without a copy.

        ``memory`` is its first address and the address after its last byte; ``described`` has the
        shape, dtype and strides of the array, whose first element lies at ``address``.
        """

    def device_of(self, array: Any) -> int:
        """Return the index of the device that an array lies on."""

    def current(self, device: int) -> Any:
        """Return this thread's current stream on a device; its address is ``ptr``."""

    def pinned(self, nbytes: int) -> Any:
        """Return bytes in pinned host memory, from which copies on a stream are asynchronous.

        They begin at a page boundary, and must not change before a copy from them has ended.
        """

    def at(self, device: int, stream: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that makes a device, and a stream of it, current."""

    def to_host(self, array: Any) -> Any:
        """Return a copy in host memory; the host waits for it."""

    def read_only(self, array: Any) -> Any:
        """Return a read-only view; CuPy has no read-only arrays, so its view is writable."""

    def is_writable(self, array: Any) -> bool:
        """Return whether an array is writable."""

    def overwrite(
        self, device: int, stream: int, targets: Sequence[Any], sources: Sequence[Any]
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
    """Return the installed packages among those that a GPU needs."""
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

    Parameters
    ----------
    version : (int, int) or None
        The CUDA version of the driver; None where there is no driver, or where it fails to start.
    problem : str
        The driver's error on its initialization, or "".
    count : int
        The number of visible devices.
    installed : tuple of str
        The installed packages.
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
    extra = "cuda13" if version[0] >= 13 else "cuda12"
    runs = f"the driver runs CUDA {version[0]}.{version[1]}"
    install = f"python -m pip install 'dvkernels[{extra}]'"
    if version[0] < 12:
        return f"{runs}, and CUDA 12 or later is needed: update the NVIDIA driver"
    if version[0] < 13 and "cupy-cuda13x" in installed and "cupy-cuda12x" not in installed:
        return (
            f"{runs}, and the packages here are for CUDA 13: python -m pip uninstall cupy-cuda13x, "
            f"then {install}, or update the driver"
        )
    for name, package_name in (("numba-cuda", "numba-cuda"), ("cupy", "CuPy")):
        if not any(installed_name.startswith(name) for installed_name in installed):
            return f"{package_name} is not installed; {runs}: {install}"
    return ""


def require(verb: str) -> None:
    """Raise :class:`DeviceError` unless kernels can run on a GPU here."""
    problem = missing()
    if problem:
        raise DeviceError(f"{verb}: {problem}")


@functools.cache
def arrays() -> ArrayLibrary:
    """Return the array library of this process: CuPy's twin, or the simulator's."""
    require("arrays on a GPU")
    kind = _SimulatedArrays if is_simulated() else _CuPyArrays
    return cast(
        ArrayLibrary, shielded.beyond_interrupts(kind)
    )  # the constructor imports Numba, or CuPy


def as_numba(array: Any) -> Any:
    """Return a CuPy array as a Numba device array, without a copy."""
    from numba import cuda

    untyped: Any = cuda
    return untyped.as_cuda_array(array)


class _CuPyArrays:
    """Array library of CuPy, from its memory pools."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy

    def empty(
        self, device: int, shape: tuple[int, ...], dtype: Any, stream: int | None = None
    ) -> Any:
        """Return a new array on a device."""
        try:
            with self._cupy.cuda.Device(device):
                if stream is None:
                    return self._cupy.empty(shape, dtype)
                with self._cupy.cuda.ExternalStream(stream, device):
                    return self._cupy.empty(shape, dtype)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            nbytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
            raise DeviceError(
                f"cuda:{device} has no room for {nbytes:,} more bytes: free arrays, call "
                f"cupy.get_default_memory_pool().free_all_blocks(), or use smaller ones ({error})"
            ) from None

    def copy(self, target: Any, source: Any, stream: Any = None) -> None:
        """Copy between the host and devices."""
        on_device = target if isinstance(target, self._cupy.ndarray) else source
        with on_device.device, stream or self._cupy.cuda.get_current_stream():
            if on_device is not target:
                source.get(out=target, blocking=stream is None)
            elif isinstance(source, self._cupy.ndarray):
                self._cupy.copyto(target, source)
            else:
                target.set(source)

    def stream(self, device: int, *, joins_default: bool = False) -> Any:
        """Return a new stream."""
        with self._cupy.cuda.Device(device):
            return self._cupy.cuda.Stream(non_blocking=not joins_default)

    def event(self, device: int) -> Any:
        """Return a new event."""
        with self._cupy.cuda.Device(device):
            return self._cupy.cuda.Event(disable_timing=True)

    def identity(self, device: int) -> str:
        """Return the UUID of a device."""
        cuda_driver = driver.find()
        assert cuda_driver is not None
        return cuda_driver.uuid(device)

    def over(
        self,
        memory: tuple[int, int],
        address: int,
        described: Any,
        device: int,
        owner: Any,
    ) -> Any:
        """Return an array over the memory of another library's array."""
        start, stop = memory
        memory_of_owner = self._cupy.cuda.UnownedMemory(start, stop - start, owner, device)
        pointer = self._cupy.cuda.MemoryPointer(memory_of_owner, address - start)
        return self._cupy.ndarray(described.shape, described.dtype, pointer, described.strides)

    def device_of(self, array: Any) -> int:
        """Return the index of the device that an array lies on."""
        return int(array.device.id)

    def current(self, device: int) -> Any:
        """Return this thread's current stream."""
        return self._cupy.cuda.get_current_stream(device)

    def pinned(self, nbytes: int) -> Any:
        """Return bytes in pinned host memory."""
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    def at(self, device: int, stream: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Make a device, and a stream of it, current."""
        contexts = contextlib.ExitStack()
        contexts.enter_context(self._cupy.cuda.Device(device))
        if stream is not None:  # CuPy enters streams of the current device only
            contexts.enter_context(stream)
        return contexts

    def to_host(self, array: Any) -> Any:
        """Return a copy in host memory."""
        with array.device:
            return array.get()

    def read_only(self, array: Any) -> Any:
        """Return a view."""
        return array.view()

    def is_writable(self, array: Any) -> bool:
        """Return True: CuPy has no read-only arrays."""
        return True

    def overwrite(
        self, device: int, stream: int, targets: Sequence[Any], sources: Sequence[Any]
    ) -> None:
        """Copy contiguous arrays to contiguous arrays, on a stream."""
        cuda_driver = driver.find()
        assert cuda_driver is not None
        target_addresses = [array.data.ptr for array in targets]
        source_addresses = [array.data.ptr for array in sources]
        cuda_driver.copy_each(
            device, stream, target_addresses, source_addresses, [array.nbytes for array in sources]
        )


class _SimulatedArrays:
    """Array library of Numba's simulator: arrays on the host; work is done when it is enqueued."""

    def __init__(self) -> None:
        from numba import cuda

        from dvkernels.devices import simulated_arrays

        untyped: Any = cuda
        self._kind = simulated_arrays.kind_of(type(untyped.device_array(1)))

    def empty(
        self, device: int, shape: tuple[int, ...], dtype: Any, stream: int | None = None
    ) -> Any:
        """Return a new array."""
        return self._kind(np.empty(shape, dtype))

    def copy(self, target: Any, source: Any, stream: Any = None) -> None:
        """Copy immediately."""
        host_targets, host_sources = (getattr(array, "_ary", array) for array in (target, source))
        np.copyto(host_targets, host_sources, casting="no")

    def stream(self, device: int, *, joins_default: bool = False) -> Any:
        """Return a stand-in for a stream."""
        return _CompletedStream()

    def event(self, device: int) -> Any:
        """Return a stand-in for an event."""
        return _CompletedStream()

    def identity(self, device: int) -> str:
        """Return an identifier with the process: each process has its own simulated device."""
        return f"simulated by process {os.getpid()}"

    def over(
        self,
        memory: tuple[int, int],
        address: int,
        described: Any,
        device: int,
        owner: Any,
    ) -> Any:
        """Return an array over memory of another array."""
        return owner if isinstance(owner, self._kind) else self._kind(owner._ary)

    def device_of(self, array: Any) -> int:
        """Return 0, the only device."""
        return 0

    def current(self, device: int) -> Any:
        """Return a stand-in for a stream."""
        return _CompletedStream()

    def pinned(self, nbytes: int) -> Any:
        """Return bytes."""
        return np.empty(nbytes, np.uint8)

    def at(self, device: int, stream: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Change nothing."""
        return contextlib.nullcontext()

    def to_host(self, array: Any) -> Any:
        """Return a copy."""
        return array._ary.copy()

    def read_only(self, array: Any) -> Any:
        """Return a read-only view."""
        view = array._ary.view()
        view.flags.writeable = False
        return self._kind(view)

    def is_writable(self, array: Any) -> bool:
        """Return whether an array is writable."""
        return bool(array._ary.flags.writeable)

    def overwrite(
        self, device: int, stream: int, targets: Sequence[Any], sources: Sequence[Any]
    ) -> None:
        """Copy arrays to arrays."""
        host_arrays = ([array._ary for array in arrays] for arrays in (targets, sources))
        host_targets, host_sources = host_arrays
        deque(map(operator.setitem, host_targets, itertools.repeat(...), host_sources), maxlen=0)


class _CompletedStream:
    """Stand-in for a stream or an event whose work is complete."""

    ptr = 0
    done = True

    def __enter__(self) -> _CompletedStream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Do nothing: there is nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""
