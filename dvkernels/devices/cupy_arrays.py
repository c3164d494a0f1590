"""Array library of CuPy: allocation, copies and streams on GPUs, from CuPy's memory pools."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from dvkernels.devices import driver
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import DeviceError

__all__ = ["CuPyArrays"]


class _StreamAddress:
    """Address of a stream, in the protocol that CuPy 14 takes streams of other libraries by."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


class CuPyArrays:
    """The :class:`dvkernels.devices.cuda.ArrayLibrary` of CuPy."""

    def empty(
        self, device: int, shape: tuple[int, ...], dtype: Any, stream: int | None = None
    ) -> Any:
        try:
            with cupy.cuda.Device(device):
                if stream is None:
                    return cupy.empty(shape, dtype)
                with self.stream_at(device, stream):
                    return cupy.empty(shape, dtype)
        except cupy.cuda.memory.OutOfMemoryError as error:
            nbytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
            raise DeviceError(
                f"cuda:{device} has no room for {nbytes:,} more bytes: free arrays, call "
                f"cupy.get_default_memory_pool().free_all_blocks(), or use smaller ones ({error})"
            ) from None

    def copy(self, target: Any, source: Any, stream: Any = None) -> None:
        on_device = target if isinstance(target, cupy.ndarray) else source
        with on_device.device, stream or cupy.cuda.get_current_stream():
            if on_device is not target:
                source.get(out=target, blocking=stream is None)
            elif isinstance(source, cupy.ndarray):
                cupy.copyto(target, source)
            else:
                target.set(source)

    def stream(self, device: int, *, joins_default: bool = False) -> Any:
        with cupy.cuda.Device(device):
            return cupy.cuda.Stream(non_blocking=not joins_default)

    def stream_at(self, device: int, address: int) -> Any:
        from_external = getattr(cupy.cuda.Stream, "from_external", None)
        if from_external is None:  # CuPy 13
            return cupy.cuda.ExternalStream(address, device)
        return from_external(_StreamAddress(address))

    def event(self, device: int) -> Any:
        with cupy.cuda.Device(device):
            return cupy.cuda.Event(disable_timing=True)

    def identity(self, device: int) -> str:
        cuda_driver = driver.find()
        assert cuda_driver is not None
        return cuda_driver.uuid(device)

    def over(self, described: HostArray, device: int, owner: Any) -> Any:
        start, stop = map(int, np.lib.array_utils.byte_bounds(described))
        memory = cupy.cuda.UnownedMemory(start, stop - start, owner, device)
        pointer = cupy.cuda.MemoryPointer(memory, int(described.ctypes.data) - start)
        return cupy.ndarray(described.shape, described.dtype, pointer, described.strides)

    def device_of(self, array: Any) -> int:
        return int(array.device.id)

    def current(self, device: int) -> Any:
        return cupy.cuda.get_current_stream(device)

    def pinned(self, nbytes: int) -> Any:
        return np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    def at(self, device: int, stream: Any = None) -> contextlib.AbstractContextManager[Any]:
        contexts = contextlib.ExitStack()
        contexts.enter_context(cupy.cuda.Device(device))
        if stream is not None:  # CuPy enters streams of the current device only
            contexts.enter_context(stream)
        return contexts

    def to_host(self, array: Any) -> Any:
        with array.device:
            return array.get()

    def read_only(self, array: Any) -> Any:
        return array.view()  # CuPy has no read-only arrays

    def is_writable(self, array: Any) -> bool:
        return True

    def overwrite(
        self, device: int, stream: int, targets: Sequence[Any], sources: Sequence[Any]
    ) -> None:
        cuda_driver = driver.find()
        assert cuda_driver is not None
        target_addresses = [array.data.ptr for array in targets]
        source_addresses = [array.data.ptr for array in sources]
        cuda_driver.copy_each(
            device, stream, target_addresses, source_addresses, [array.nbytes for array in sources]
        )
