"""Peer access between the GPUs of this process, and the driver operations of a device group."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dvkernels.devices import driver
from dvkernels.kernels import checks
from dvkernels.kernels.cuda.engine import launcher
from dvkernels.kernels.cuda.engine.kernel import Kernel
from dvkernels.schedules.flag_selection import AccessMatrix

__all__ = ["DeviceMemory", "PeerAccess", "reach"]


class DeviceMemory:
    """Memory of a device, freed with this object."""

    def __init__(self, address: int, free: Callable[[int], None]) -> None:
        self.address = address
        # At the exit of the process the driver frees all memory, and must not be called any more.
        weakref.finalize(self, free, address).atexit = False


class _Event:
    """Event of a device that is destroyed with this object."""

    def __init__(self, cuda_driver: driver.Driver, device: int) -> None:
        self.handle = cuda_driver.event(device)
        weakref.finalize(self, cuda_driver.destroy, device, self.handle).atexit = False


class PeerAccess:
    """Driver operations that a device group needs, on the devices of its ranks."""

    def __init__(self, cuda_driver: driver.Driver) -> None:
        self._driver = cuda_driver

    def empty(self, device: int, nbytes: int) -> DeviceMemory:
        """Allocate memory of a device, at a multiple of 256 bytes."""
        address = self._driver.allocate(device, nbytes)
        return DeviceMemory(address, functools.partial(self._driver.free, device))

    def words(self, device: int, words: Sequence[int]) -> DeviceMemory:
        """Allocate memory and write int64 words to it before returning."""
        host = np.array(words, np.int64)
        memory = self.empty(device, host.nbytes)
        self._driver.write(device, memory.address, checks.address(host), host.nbytes)
        return memory

    def pinned(self, device: int, num_words: int) -> Any:
        """Return zeroed int64 words in host memory that all devices access at the same address."""
        address = self._driver.allocate_on_host(device, 8 * num_words)
        memory: Any = (ctypes.c_int64 * num_words).from_address(address)
        words = np.ndarray(num_words, np.int64, memory)
        words[:] = 0
        weakref.finalize(memory, self._driver.free_on_host, device, address).atexit = False
        return words

    def load(self, device: int, kernel: Kernel) -> int:
        """Load a kernel onto a device; return how many of its blocks run there at once."""
        launcher.prepare(kernel, device)
        return launcher.num_resident(kernel, device)

    def launch(
        self,
        device: int,
        kernel: Kernel,
        num_blocks: int,
        stream: int,
        words: Sequence[int],
    ) -> None:
        """Launch a loaded kernel without waiting for a device."""
        launcher.launch(kernel, device, num_blocks, words, stream)

    def event(self, device: int) -> Any:
        """Return an event of a device, which has happened."""
        return _Event(self._driver, device)

    def record(self, lanes: Iterable[tuple[int, int, Any]]) -> None:
        """Let each event happen after the present work of a stream: (device, stream, event)."""
        self._driver.record([(device, stream, event.handle) for device, stream, event in lanes])

    def wait(self, lanes: Iterable[tuple[int, int, Any]]) -> None:
        """Let each stream wait for an event of any device: (device, stream, event)."""
        self._driver.wait_for([(device, stream, event.handle) for device, stream, event in lanes])

    def synchronize(self, device: int) -> None:
        """Wait until a device has done all its work."""
        self._driver.synchronize(device)


def reach(cuda_driver: driver.Driver, devices: Sequence[int]) -> AccessMatrix:
    """Enable peer access for every pair of devices; return the matrix of pairs that have it.

    A pair counts only if the driver reports peer access and can enable it.
    """
    return [
        [device == peer or cuda_driver.open_peer(device, peer) for peer in devices]
        for device in devices
    ]
