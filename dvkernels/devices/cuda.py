"""CUDA devices: which there are, what is missing where there are none, and arrays on them.

CuPy is what the library itself allocates on a GPU. Kernels need four verbs of it, ``empty``,
``copy``, ``stream`` and ``event``; strategies, whose variables are such arrays, a few more. A
second twin has the same over the arrays of Numba's simulator: ``testing.check_arrays`` holds both
to one contract.
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
from dvkernels.devices.base import Device
from dvkernels.errors import DeviceError
from dvkernels.threads import shielded

__all__ = ["ArrayLibrary", "arrays", "devices", "is_simulated", "missing"]


class ArrayLibrary(Protocol):
    """Arrays of CUDA devices: the seam to the library that makes them."""

    def empty(
        self, device: int, shape: tuple[int, ...], dtype: Any, stream: int | None = None
    ) -> Any:
        """Return a new array on a device, its elements not set.

        Its memory is ordered on a stream (its address; None: the current one): what is given that
        memory later comes after what that stream was given before.
        """

    def copy(self, target: Any, source: Any, stream: Any = None) -> None:
        """Copy between the host and devices, in the order of ``stream``.

        The host waits only where its memory is pageable: NumPy arrays that are not pinned.
        """

    def stream(self, device: int, *, joins_default: bool = False) -> Any:
        """Return a new stream: ``with stream:`` makes it current, ``synchronize()`` waits.

        ``joins_default``: it waits for what is put on the device's default stream, and that for it.
        """

    def event(self, device: int) -> Any:
        """Return a new event: ``record(stream)``, ``synchronize()``; ``stream.wait_event(it)``.

        Its ``done`` tells, without waiting, whether it has happened.
        """

    def identity(self, device: int) -> str:
        """Return what a device is called by every process that sees it, and no other one is."""

    def over(
        self,
        memory: tuple[int, int],
        address: int,
        described: Any,
        device: int,
        owner: Any,
    ) -> Any:
        """Return an array over memory of another library's array, ``owner``, not copied.

        ``memory`` is its first address and the one past its last; ``described`` has the shape,
        dtype and strides of the array, whose first element lies at ``address``.
        """

    def device_of(self, array: Any) -> int:
        """Return the device whose memory an array lies in."""

    def current(self, device: int) -> Any:
        """Return the stream that is current in this thread on a device; its address is ``ptr``."""

    def pinned(self, nbytes: int) -> Any:
        """Return bytes in memory of the host that copies on a stream read while the host goes on.

        They begin at a page. What is copied from them must have been copied before they change.
        """

    def at(self, device: int, stream: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that makes a device, and a stream of it, current."""

    def to_host(self, array: Any) -> Any:
        """Return a copy in the memory of the host, which waits for it."""

    def bytes_of(self, array: Any) -> Any:
        """Return the bytes of a dense array, flat, not copied, as MPI takes them.

        MPI waits for no stream, neither to read nor to write them.
        """

    def read_only(self, array: Any) -> Any:
        """Return a view that is not to be written to.

        CuPy knows no such thing: its view could be written to.
        """

    def is_writable(self, array: Any) -> bool:
        """Return whether an array may be written to."""

    def overwrite(
        self, device: int, stream: int, targets: Sequence[Any], sources: Sequence[Any]
    ) -> None:
        """Copy dense arrays to dense arrays, all in turn, on a stream of a device.

        No interrupt of the interpreter falls between two of them.
        """


def is_simulated() -> bool:
    """Return whether Numba's simulator stands in for a GPU in this process."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def devices() -> list[Device]:
    """Return the CUDA devices that this process sees: none where there is no driver.

    ``CUDA_VISIBLE_DEVICES`` says which: they are counted from 0 in its order.
    """
    return [Device("cuda", index) for index in range(_count())]


def _count() -> int:
    if is_simulated():
        return simulated_count(os.environ.get("CUDA_VISIBLE_DEVICES"))
    found = driver.find()
    return 0 if found is None else found.count()


def simulated_count(visible: str | None) -> int:
    """Return how many devices the simulator has: its one, unless the variable hides it."""
    return int(visible is None or visible.split(",")[0].strip() == "0")


def missing() -> str:
    """Return why kernels cannot run on GPUs here and what to do, or "" where they can."""
    if is_simulated():
        return "" if _count() else "CUDA_VISIBLE_DEVICES hides the simulated device: unset it"
    found = driver.find()
    if found is None:
        return explain(None, "", 0, ())
    if found.is_inherited:
        return (
            "this process was forked from one that had begun to use the GPU, and the driver serves "
            "only that one: start processes with the method 'spawn' or 'forkserver'"
        )
    return _missing_with(found)


@functools.cache
def _missing_with(found: driver.Driver) -> str:
    """Return what is missing beside a driver, asked once: it does not change while it runs."""
    version = None if found.problem else found.version()
    return explain(version, found.problem, found.count(), _installed())


_PACKAGES = ("numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "cupy")


@functools.cache
def _installed() -> tuple[str, ...]:
    """Return which of the packages that a GPU needs are installed."""
    from importlib import metadata  # 15 ms, and only where there is a driver

    found = []
    for name in _PACKAGES:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    return tuple(found)


def explain(
    version: tuple[int, int] | None, problem: str, count: int, installed: tuple[str, ...]
) -> str:
    """Return what is missing, and what to do, given what was found.

    Parameters
    ----------
    version : (int, int) or None
        The CUDA version of the driver; None where there is no driver, or ``problem`` keeps it
        from starting.
    problem : str
        What the driver says when it is started.
    count : int
        The devices it sees.
    installed : tuple of str
        The packages that are there.
    """
    if problem:
        return f"the NVIDIA driver does not start ({problem}): see that nvidia-smi works"
    if version is None:
        return (
            "no NVIDIA driver was found (libcuda.so.1): install one, and see that nvidia-smi works"
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
    for name, needed in (("numba-cuda", "numba-cuda"), ("cupy", "CuPy")):
        if not any(package.startswith(name) for package in installed):
            return f"{needed} is not installed; {runs}: {install}"
    return ""


def require(verb: str) -> None:
    """Raise :class:`DeviceError` unless kernels can run on a GPU here."""
    problem = missing()
    if problem:
        raise DeviceError(f"{verb}: {problem}")


@functools.cache
def arrays() -> ArrayLibrary:
    """Return the twin of this process: the simulator's arrays, or CuPy's."""
    require("arrays on a GPU")
    kind = _SimulatedArrays if is_simulated() else _CuPyArrays
    return cast(ArrayLibrary, shielded.beyond_interrupts(kind))  # which imports Numba, or CuPy


def as_numba(array: Any) -> Any:
    """Return a CuPy array as one of Numba, not copied."""
    from numba import cuda

    untyped: Any = cuda
    return untyped.as_cuda_array(array)


class _CuPyArrays:
    """Arrays of CuPy, from its memory pools."""

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
                f"cuda:{device} has no room for {nbytes:,} bytes more: free arrays, call "
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
        found = driver.find()
        assert found is not None
        return found.uuid(device)

    def over(
        self,
        memory: tuple[int, int],
        address: int,
        described: Any,
        device: int,
        owner: Any,
    ) -> Any:
        """Return an array over memory of another library's array."""
        start, stop = memory
        held = self._cupy.cuda.UnownedMemory(start, stop - start, owner, device)
        pointer = self._cupy.cuda.MemoryPointer(held, address - start)
        return self._cupy.ndarray(described.shape, described.dtype, pointer, described.strides)

    def device_of(self, array: Any) -> int:
        """Return the device whose memory an array lies in."""
        return int(array.device.id)

    def current(self, device: int) -> Any:
        """Return this thread's current stream."""
        return self._cupy.cuda.get_current_stream(device)

    def pinned(self, nbytes: int) -> Any:
        """Return bytes in page-locked memory of the host."""
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    def at(self, device: int, stream: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Make a device, and a stream of it, current."""
        both = contextlib.ExitStack()
        both.enter_context(self._cupy.cuda.Device(device))
        if stream is not None:  # CuPy enters the streams of the current device only
            both.enter_context(stream)
        return both

    def to_host(self, array: Any) -> Any:
        """Return a copy in the memory of the host."""
        with array.device:
            return array.get()

    def bytes_of(self, array: Any) -> Any:
        """Return a view."""
        return array.reshape(-1).view(np.uint8)

    def read_only(self, array: Any) -> Any:
        """Return a view."""
        return array.view()

    def is_writable(self, array: Any) -> bool:
        """Return True: CuPy has no read-only arrays."""
        return True

    def overwrite(
        self, device: int, stream: int, targets: Sequence[Any], sources: Sequence[Any]
    ) -> None:
        """Copy dense arrays to dense arrays."""
        found = driver.find()
        assert found is not None
        into = [array.data.ptr for array in targets]
        taken = [array.data.ptr for array in sources]
        found.copy_each(device, stream, into, taken, [array.nbytes for array in sources])


class _SimulatedArrays:
    """Arrays of Numba's simulator, which live on the host; its streams do all at once."""

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
        """Copy, at once."""
        into, taken = (getattr(array, "_ary", array) for array in (target, source))
        np.copyto(into, taken, casting="no")

    def stream(self, device: int, *, joins_default: bool = False) -> Any:
        """Return what stands in for a stream."""
        return _Done()

    def event(self, device: int) -> Any:
        """Return what stands in for an event."""
        return _Done()

    def identity(self, device: int) -> str:
        """Return what nothing else is called: each process has a simulated device of its own."""
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
        """Return 0: there is one."""
        return 0

    def current(self, device: int) -> Any:
        """Return what stands in for a stream."""
        return _Done()

    def pinned(self, nbytes: int) -> Any:
        """Return bytes."""
        return np.empty(nbytes, np.uint8)

    def at(self, device: int, stream: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Change nothing."""
        return contextlib.nullcontext()

    def to_host(self, array: Any) -> Any:
        """Return a copy."""
        return array._ary.copy()

    def bytes_of(self, array: Any) -> Any:
        """Return a view by NumPy: the memory is that of the host."""
        return array._ary.reshape(-1).view(np.uint8)

    def read_only(self, array: Any) -> Any:
        """Return a view that cannot be written to."""
        view = array._ary.view()
        view.flags.writeable = False
        return self._kind(view)

    def is_writable(self, array: Any) -> bool:
        """Return whether an array may be written to."""
        return bool(array._ary.flags.writeable)

    def overwrite(
        self, device: int, stream: int, targets: Sequence[Any], sources: Sequence[Any]
    ) -> None:
        """Copy arrays to arrays."""
        bare = ([array._ary for array in arrays] for arrays in (targets, sources))
        into, taken = bare
        deque(map(operator.setitem, into, itertools.repeat(...), taken), maxlen=0)


class _Done:
    """A stream, or an event, on which everything has already happened."""

    ptr = 0
    done = True

    def __enter__(self) -> _Done:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Do nothing: there is nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""
