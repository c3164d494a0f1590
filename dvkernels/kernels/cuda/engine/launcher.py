"""Starts a kernel over a table: through the driver, or in the simulator.

A kernel is compiled for a device when it is first asked for there, in each process: half a second.
"""

from __future__ import annotations

import array
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import cuda as numba_cuda

from dvkernels.devices import cuda as devices
from dvkernels.devices import driver
from dvkernels.errors import DeviceError
from dvkernels.kernels import checks
from dvkernels.kernels.cuda.engine import compiler, intrinsics, launch_table

__all__ = ["LongTables", "RepeatedLaunch", "launch", "num_blocks", "prepare", "threads"]

cuda: Any = numba_cuda  # its functions carry no types

Kernel = Callable[..., None]

_NUM_WORDS = launch_table.NUM_WORDS
_handles: dict[tuple[int, Kernel], int] = {}
_free: list[driver.Arguments] = []  # one for each launch that is being made
_compiling = threading.RLock()
# The simulator has one kernel at a time in the whole process.
_simulating = threading.RLock()
# As few threads and blocks as still differ from one: each thread of the simulator is one of Python.
_SIMULATED_THREADS, _SIMULATED_BLOCKS = 2, 2
_WAVES = 8  # blocks a multiprocessor: two or three run at once, the others even out the end


def threads() -> int:
    """Return the threads of a block."""
    return _SIMULATED_THREADS if intrinsics.SIMULATED else launch_table.THREADS


def num_blocks(device: int) -> int:
    """Return the most blocks that a launch has: beyond, each takes several pieces."""
    if intrinsics.SIMULATED:
        return _SIMULATED_BLOCKS
    return _WAVES * _driver().num_multiprocessors(device)


def launch(kernel: Kernel, device: int, blocks: int, words: Sequence[int], stream: int) -> None:
    """Run a kernel over a table on a stream; it has not ended when this returns."""
    if intrinsics.SIMULATED:
        _simulate(kernel, blocks, words)
        return
    if len(words) < launch_table.NUM_WORDS:
        _start(kernel, device, blocks, _framed(words), stream)
    else:
        prepare(kernel, device)
        held = _long_tables.place(device, stream, words)
        _start(kernel, device, blocks, array.array("q", [held, *[0] * (_NUM_WORDS - 1)]), stream)


class RepeatedLaunch:
    """A launch over a short table, again and again, with other addresses in its last words.

    Parameters
    ----------
    kernel, device, blocks, words
        As in :func:`launch`.
    num_addresses : int
        The words at the end that change.
    """

    __slots__ = ("_begin", "_blocks", "_device", "_end", "_kernel", "_words")

    def __init__(
        self, kernel: Kernel, device: int, blocks: int, words: Sequence[int], num_addresses: int
    ) -> None:
        self._kernel, self._device, self._blocks = kernel, device, blocks
        self._words = _framed(words)
        self._end = 1 + len(words)
        self._begin = self._end - num_addresses

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """Launch; several threads may do so at once."""
        words = self._words[:]
        words[self._begin : self._end] = array.array("q", addresses)
        if intrinsics.SIMULATED:
            _simulate(self._kernel, self._blocks, words[1 : self._end])
        else:
            _start(self._kernel, self._device, self._blocks, words, stream)


def _framed(words: Sequence[int]) -> array.array[int]:
    """Return the arguments of a launch: that the table is here, the table, nothing."""
    return array.array("q", [0, *words, *[0] * (_NUM_WORDS - 1 - len(words))])


def _start(kernel: Kernel, device: int, blocks: int, words: array.array[int], stream: int) -> None:
    """Launch a kernel with these arguments."""
    handle = _handles.get((device, kernel)) or prepare(kernel, device)
    try:
        arguments = _free.pop()
    except IndexError:
        arguments = driver.Arguments(_NUM_WORDS)
    arguments.words[:] = words
    try:
        _driver().launch(device, handle, blocks, launch_table.THREADS, arguments, stream)
    except DeviceError:
        # The device may have been reset, and the kernel is gone with all else: load it again.
        _handles.pop((device, kernel), None)
        raise
    _free.append(arguments)


def prepare(kernel: Kernel, device: int) -> int:
    """Compile a kernel and load it on a device; return its handle there."""
    try:
        _compiling.acquire()
        key = (device, kernel)
        if key not in _handles:
            capability = _driver().capability(device)
            compiled = compiler.compile_to_ptx(kernel, capability)
            image = compiler.assemble(compiled, capability)
            _handles[key] = _driver().load(device, image, compiled.name)
        return _handles[key]
    finally:
        try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
            _compiling.release()
        except RuntimeError:  # not ours: the wait was interrupted
            pass


def _driver() -> driver.Driver:
    found = driver.find()
    if found is None:
        devices.require("a kernel")
        raise DeviceError("no NVIDIA driver was found")
    return found


def _simulate(kernel: Kernel, blocks: int, words: Sequence[int]) -> None:
    held = np.array(words, np.int64)
    arguments = (checks.address(held), *[0] * (launch_table.NUM_WORDS - 1))
    with _simulating:
        simulated: Any = cuda.jit(kernel)
        simulated[blocks, _SIMULATED_THREADS](arguments)


class LongTables:
    """Tables that are too long to be arguments, in device memory.

    The same arrays give the same table, step after step: it is kept, and the next step copies
    nothing. It lies in memory of the stream that reads it, so that what takes its place later, on
    that stream, comes after. What a captured graph reads stays for good.
    """

    _MOST = 256

    def __init__(self) -> None:
        self._held: dict[tuple[int, int, bytes], Any] = {}
        self._captured: dict[tuple[int, int, bytes], Any] = {}
        self._lock = threading.RLock()

    def place(self, device: int, stream: int, words: Sequence[int]) -> int:
        """Return the address on the device of a table with these words."""
        import cupy

        content = array.array("q", words).tobytes()
        key = (device, stream, content)
        is_captured = bool(cupy.cuda.runtime.streamIsCapturing(stream))
        try:
            self._lock.acquire()
            found = self._captured.get(key) or self._held.pop(key, None)
            if found is None and is_captured:
                raise DeviceError(
                    "a call with this many arrays places a table on the GPU, which a graph that is "
                    "being captured cannot do: make the same call once on the stream, before"
                )
            if found is None:
                found = self._copied(cupy, device, stream, content)
            if is_captured or key in self._captured:
                self._captured[key] = found
            else:
                self._held[key] = found  # the latest used come last
            while len(self._held) > self._MOST:
                _, _, copied = self._held.pop(next(iter(self._held)))
                copied.synchronize()  # long ago: the memory it was copied from can go
            return int(found[0].data.ptr)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._lock.release()
            except RuntimeError:  # not ours: the wait was interrupted
                pass

    def _copied(self, cupy: Any, device: int, stream: int, content: bytes) -> tuple[Any, Any, Any]:
        """Return the table, the memory it is copied from, and the event of that."""
        with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream, device) as order:
            staged = cupy.cuda.alloc_pinned_memory(len(content))
            host = np.frombuffer(staged, np.uint8, len(content))
            host[:] = np.frombuffer(content, np.uint8)
            table = cupy.empty(len(content), np.uint8)
            table.data.copy_from_host_async(host.ctypes.data, len(content), order)
            copied = cupy.cuda.Event(disable_timing=True)
            copied.record(order)
        return table, staged, copied


_long_tables = LongTables()
