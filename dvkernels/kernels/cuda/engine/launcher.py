"""Launcher of kernels over launch tables: through the driver, or in the simulator.

A process loads a kernel on a device at its first launch there. Most kernels ship as PTX, which the
driver assembles; others are compiled.
"""

from __future__ import annotations

import array
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from dvkernels.devices import cuda as devices
from dvkernels.devices import driver
from dvkernels.devices.gpu_times import GpuSpan
from dvkernels.errors import DeviceError
from dvkernels.kernels import numba_import
from dvkernels.kernels.cuda.engine import shipped_ptx, simulator, table_layout
from dvkernels.kernels.cuda.engine.kernel import Kernel
from dvkernels.profiler import tracing

__all__ = [
    "LongTables",
    "RepeatedLaunch",
    "launch",
    "launching",
    "num_resident",
    "prepare",
]

_NUM_WORDS = table_layout.NUM_WORDS
_handles: dict[tuple[int, Kernel], int] = {}
_num_resident: dict[tuple[int, Kernel], int] = {}
_free_arguments: list[driver.Arguments] = []  # for reuse: one per concurrent launch
# Held while a kernel is compiled and loaded, and between the launches of a call whose kernels wait
# for each other: loading may wait for a device, and that device for a launch. All groups of devices
# share it: two calls, each launched first on another device, would wait for each other.
launching = threading.RLock()


def num_resident(kernel: Kernel, device: int) -> int:
    """Return how many blocks of a kernel run at once on a device."""
    if simulator.IS_ON:
        return 1
    key = device, kernel
    if key not in _num_resident:
        handle, cuda_driver = prepare(kernel, device), _driver()
        blocks = cuda_driver.num_resident_blocks(device, handle, kernel.launch_bounds[0])
        _num_resident[key] = blocks * cuda_driver.num_multiprocessors(device)
    return _num_resident[key]


def launch(kernel: Kernel, device: int, blocks: int, words: Sequence[int], stream: int) -> None:
    """Launch a kernel over a table on a stream; do not wait for its end."""
    if simulator.IS_ON:
        simulator.launch(kernel, blocks, words)
        return
    if len(words) < table_layout.NUM_WORDS:
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
        if simulator.IS_ON:
            simulator.launch(self._kernel, self._blocks, words[1 : self._end])
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
        _driver().launch(device, handle, blocks, kernel.launch_bounds[0], arguments, stream)
    except DeviceError:
        # The device may have been reset, which unloads the kernel: load it again next time.
        _handles.pop((device, kernel), None)
        raise
    _free_arguments.append(arguments)
    if span is not None:
        span.end(kernel.entry, "kernel", {"blocks": blocks})


def prepare(kernel: Kernel, device: int) -> int:
    """Load a kernel on a device, as it ships or compiled here; return its handle there."""
    try:
        launching.acquire()
        key = (device, kernel)
        if key not in _handles:
            capability = _driver().capability(device)
            image = shipped_ptx.find(kernel, capability) or _compile(kernel, capability)
            _handles[key] = _driver().load(device, image, kernel.entry)
        return _handles[key]
    finally:
        try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
            launching.release()
        except RuntimeError:  # not acquired: the wait was interrupted
            pass


def _compile(kernel: Kernel, capability: tuple[int, int]) -> bytes:
    """Compile a kernel, in half a second or more, and return its machine code."""
    devices.require_compiler(f"{kernel!r}, {shipped_ptx.reason(kernel, capability)},")
    compiler = numba_import.module("dvkernels.kernels.cuda.engine.compiler")
    image: bytes = compiler.assemble(compiler.compile_to_ptx(kernel, capability), capability)
    return image


def _driver() -> driver.Driver:
    cuda_driver = driver.find()
    if cuda_driver is None:
        devices.require("a kernel")
        raise DeviceError("no NVIDIA driver was found")
    return cuda_driver


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
        content = array.array("q", words).tobytes()
        key = (device, stream, content)
        is_captured = _driver().is_capturing(device, stream)
        try:
            self._lock.acquire()
            entry = self._captured.get(key) or self._recent.pop(key, None)
            if entry is None and is_captured:
                raise DeviceError(
                    "a call with this many arrays copies a table to the GPU, which is impossible "
                    "while a graph is captured: make the same call once on the stream, before"
                )
            if entry is None:
                entry = self._copy_to_device(device, stream, content)
            elif not is_captured:
                # The handle may be that of another stream by now, or of another thread's default.
                _driver().wait_for([(device, stream, entry[2].ptr)])
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

    def _copy_to_device(self, device: int, stream: int, content: bytes) -> tuple[Any, Any, Any]:
        """Return the table, the pinned memory that it is copied from, and the event of the copy."""
        library = devices.arrays()
        order = library.stream_at(device, stream)
        with library.at(device, order):
            staged = library.pinned(len(content))
            staged[:] = np.frombuffer(content, np.uint8)
            table = library.empty(device, (len(content),), np.uint8)
            library.copy(table, staged, order)
            copy_event = library.event(device)
            copy_event.record(order)
        return table, staged, copy_event


_long_tables = LongTables()
