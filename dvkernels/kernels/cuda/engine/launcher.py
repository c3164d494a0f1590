"""Launcher of kernels over launch tables: through the driver, or in the simulator.

Each process compiles a kernel for a device on its first launch there, in half a second.
"""

from __future__ import annotations

import array
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dvkernels.devices import cuda as devices
from dvkernels.devices import driver
from dvkernels.devices.gpu_times import GpuSpan
from dvkernels.errors import DeviceError
from dvkernels.kernels import checks
from dvkernels.kernels.cuda.engine import compiler, intrinsics, launch_table
from dvkernels.kernels.cuda.engine.cuda_target import cuda
from dvkernels.profiler import tracing

__all__ = ["LongTables", "RepeatedLaunch", "launch", "num_blocks", "prepare", "threads"]


Kernel = Callable[..., None]

_NUM_WORDS = launch_table.NUM_WORDS
_handles: dict[tuple[int, Kernel], int] = {}
_free_arguments: list[driver.Arguments] = []  # for reuse: one per concurrent launch
_compiling = threading.RLock()
# The simulator runs one kernel at a time in the whole process.
_simulating = threading.RLock()
# The fewest threads and blocks that are not one: each simulated thread is a Python thread.
_SIMULATED_THREADS, _SIMULATED_BLOCKS = 2, 2
_WAVES = 8  # blocks per multiprocessor: two or three run at once, the others balance the tail


def threads() -> int:
    """Return the number of threads in a block."""
    return _SIMULATED_THREADS if intrinsics.SIMULATED else launch_table.THREADS


def num_blocks(device: int) -> int:
    """Return the largest number of blocks of a launch; with more pieces, a block takes several."""
    if intrinsics.SIMULATED:
        return _SIMULATED_BLOCKS
    return _WAVES * _driver().num_multiprocessors(device)


def launch(kernel: Kernel, device: int, blocks: int, words: Sequence[int], stream: int) -> None:
    """Launch a kernel over a table on a stream; do not wait for its end."""
    if intrinsics.SIMULATED:
        _simulate(kernel, blocks, words)
        return
    if len(words) < launch_table.NUM_WORDS:
        _start(kernel, device, blocks, _as_arguments(words), stream)
    else:
        prepare(kernel, device)
        address = _long_tables.place(device, stream, words)
        _start(kernel, device, blocks, array.array("q", [address, *[0] * (_NUM_WORDS - 1)]), stream)


class RepeatedLaunch:
    """Launch over a short table, repeatable with other addresses in its last words."""

    __slots__ = ("_begin", "_blocks", "_device", "_end", "_kernel", "_words")

    def __init__(
        self, kernel: Kernel, device: int, blocks: int, words: Sequence[int], num_addresses: int
    ) -> None:
        self._kernel, self._device, self._blocks = kernel, device, blocks
        self._words = _as_arguments(words)
        self._end = 1 + len(words)
        self._begin = self._end - num_addresses

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """Launch with these addresses; several threads may do so at once."""
        words = self._words[:]
        words[self._begin : self._end] = array.array("q", addresses)
        if intrinsics.SIMULATED:
            _simulate(self._kernel, self._blocks, words[1 : self._end])
        else:
            _start(self._kernel, self._device, self._blocks, words, stream)


def _as_arguments(words: Sequence[int]) -> array.array[int]:
    """Return the arguments of a launch: 0 (the table follows), the table, zeros."""
    return array.array("q", [0, *words, *[0] * (_NUM_WORDS - 1 - len(words))])


def _start(kernel: Kernel, device: int, blocks: int, words: array.array[int], stream: int) -> None:
    """Launch a kernel with these arguments."""
    handle = _handles.get((device, kernel)) or prepare(kernel, device)
    try:
        arguments = _free_arguments.pop()
    except IndexError:
        arguments = driver.Arguments(_NUM_WORDS)
    arguments.words[:] = words
    recording = tracing.active
    span = None if recording is None else GpuSpan(recording, device, stream)
    try:
        _driver().launch(device, handle, blocks, launch_table.THREADS, arguments, stream)
    except DeviceError:
        # The device may have been reset, which unloads the kernel: load it again next time.
        _handles.pop((device, kernel), None)
        raise
    _free_arguments.append(arguments)
    if span is not None:
        span.end(_name_of(kernel), "kernel", {"blocks": blocks})


def _name_of(kernel: Kernel) -> str:
    return getattr(kernel, "__qualname__", "kernel")


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
        except RuntimeError:  # not acquired: the wait was interrupted
            pass


def _driver() -> driver.Driver:
    cuda_driver = driver.find()
    if cuda_driver is None:
        devices.require("a kernel")
        raise DeviceError("no NVIDIA driver was found")
    return cuda_driver


def _simulate(kernel: Kernel, blocks: int, words: Sequence[int]) -> None:
    table = np.array(words, np.int64)
    arguments = (checks.address(table), *[0] * (launch_table.NUM_WORDS - 1))
    with _simulating:
        recording = tracing.active
        span = None if recording is None else GpuSpan(recording, 0, 0)
        simulated: Any = cuda.jit(kernel)
        simulated[blocks, _SIMULATED_THREADS](arguments)
        if span is not None:
            span.end(_name_of(kernel), "kernel", {"blocks": blocks})


class LongTables:
    """Cache of the tables that are too long to be arguments, in device memory.

    The same arrays give the same table, step after step; it is cached, so the next step copies
    nothing. Its memory is allocated on the stream that reads it, so that a later use of this
    memory, on the same stream, comes after the read. Tables of captured graphs are never freed.
    """

    _MAX_KEPT = 256

    def __init__(self) -> None:
        self._recent: dict[tuple[int, int, bytes], Any] = {}
        self._captured: dict[tuple[int, int, bytes], Any] = {}
        self._lock = threading.RLock()

    def place(self, device: int, stream: int, words: Sequence[int]) -> int:
        """Return the device address of a table with these words."""
        import cupy

        content = array.array("q", words).tobytes()
        key = (device, stream, content)
        is_captured = bool(cupy.cuda.runtime.streamIsCapturing(stream))
        try:
            self._lock.acquire()
            entry = self._captured.get(key) or self._recent.pop(key, None)
            if entry is None and is_captured:
                raise DeviceError(
                    "a call with this many arrays copies a table to the GPU, which is impossible "
                    "while a graph is captured: make the same call once on the stream, before"
                )
            if entry is None:
                entry = self._copy_to_device(cupy, device, stream, content)
            if is_captured or key in self._captured:
                self._captured[key] = entry
            else:
                self._recent[key] = entry  # least recently used first
            while len(self._recent) > self._MAX_KEPT:
                _, _, copy_event = self._recent.pop(next(iter(self._recent)))
                copy_event.synchronize()  # happened long ago: the pinned memory can be freed
            return int(entry[0].data.ptr)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._lock.release()
            except RuntimeError:  # not acquired: the wait was interrupted
                pass

    def _copy_to_device(
        self, cupy: Any, device: int, stream: int, content: bytes
    ) -> tuple[Any, Any, Any]:
        """Return the table, the pinned memory that it is copied from, and the event of the copy."""
        with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream, device) as order:
            staged = cupy.cuda.alloc_pinned_memory(len(content))
            host = np.frombuffer(staged, np.uint8, len(content))
            host[:] = np.frombuffer(content, np.uint8)
            table = cupy.empty(len(content), np.uint8)
            table.data.copy_from_host_async(host.ctypes.data, len(content), order)
            copy_event = cupy.cuda.Event(disable_timing=True)
            copy_event.record(order)
        return table, staged, copy_event


_long_tables = LongTables()
