"""The GPUs of this process as a team sees them: through the driver, and who reaches whom."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dvkernels.devices import driver
from dvkernels.kernels import checks
from dvkernels.kernels.cuda.engine import launcher
from dvkernels.schedules.flag_selection import AccessMatrix

__all__ = ["PeerAccess", "reach"]


class _Memory:
    """Memory of a device or of the host, given back with this object."""

    def __init__(self, address: int, free: Callable[[int], None]) -> None:
        self.address = address
        # At the end of the process the driver takes all back, and may not be asked any more.
        weakref.finalize(self, free, address).atexit = False


class _Event:
    """An event, destroyed with this object."""

    def __init__(self, handle: int, destroy: Callable[[int], None]) -> None:
        self.handle = handle
        weakref.finalize(self, destroy, handle).atexit = False


class PeerAccess:
    """What a team asks of its devices, asked of the driver.

    Parameters
    ----------
    found : driver.Driver
        The driver.
    """

    def __init__(self, found: driver.Driver) -> None:
        self._driver = found

    def empty(self, device: int, nbytes: int) -> _Memory:
        """Allocate memory of a device."""
        address = self._driver.allocate(device, nbytes)
        return _Memory(address, functools.partial(self._driver.free, device))

    def words(self, device: int, words: Sequence[int]) -> _Memory:
        """Allocate memory that holds int64 words when this returns."""
        host = np.array(words, np.int64)
        memory = self.empty(device, host.nbytes)
        self._driver.write(device, memory.address, checks.address(host), host.nbytes)
        return memory

    def pinned(self, num_words: int) -> Any:
        """Return int64 words of the host, zero, that devices reach at the same address."""
        address = self._driver.allocate_on_host(8 * num_words)
        room: Any = (ctypes.c_int64 * num_words).from_address(address)
        words = np.ndarray(num_words, np.int64, room)
        words[:] = 0
        weakref.finalize(room, self._driver.free_on_host, address).atexit = False
        return words

    def load(self, device: int, kernel: Callable[..., None]) -> None:
        """Compile a kernel, unless it is, and load it onto the device."""
        launcher.prepare(kernel, device)

    def launch(
        self,
        device: int,
        kernel: Callable[..., None],
        num_blocks: int,
        stream: int,
        words: Sequence[int],
    ) -> None:
        """Launch a loaded kernel; never wait for a device."""
        launcher.launch(kernel, device, num_blocks, words, stream)

    def record(self, device: int, stream: int) -> Any:
        """Return an event after all that the stream holds by now."""
        return _Event(self._driver.record(device, stream), self._driver.destroy)

    def wait(self, device: int, stream: int, event: Any) -> None:
        """Let the stream wait for an event, of whatever device."""
        self._driver.await_event(device, stream, event.handle)

    def synchronize(self, device: int) -> None:
        """Wait until a device has nothing left to do."""
        self._driver.synchronize(device)


def reach(found: driver.Driver, devices: Sequence[int]) -> AccessMatrix:
    """Return who reaches whose memory, asked pair by pair, and open it where that is possible.

    A pair counts only if the driver both says so and lets it be opened.
    """
    return [
        [here == there or found.open_peer(here, there) for there in devices] for here in devices
    ]
