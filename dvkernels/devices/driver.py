"""Binding of the CUDA driver (libcuda) by ctypes: devices, memory, events and launches.

The driver's C interface has been stable for a decade and needs no package; a launch takes 2 us,
where a launcher that inspects each argument takes ten times as long. Importing this module does not
initialize CUDA.
"""

from __future__ import annotations

import array
import ctypes
import functools
import itertools
import os
from collections.abc import Iterable, Sequence

from dvkernels.devices import load_log
from dvkernels.devices.driver_calls import OUT_OF_MEMORY, RELAXED, DriverCalls
from dvkernels.errors import DeviceError

__all__ = ["Arguments", "Driver", "find", "launches_block", "leave_captures_alone"]

_NAMES = ("libcuda.so.1", "libcuda.so")
_NUM_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76  # attributes of a device
_ORDINAL, _IS_OPEN = 9, 10  # attributes of a pointer: its device, whether peers may access it
_UNTIMED = 2  # flag of an event without a time stamp
_NON_BLOCKING = 1  # flag of a stream that does not synchronize with the default stream
_FOR_ALL_DEVICES = 3  # flags of host memory: portable and mapped
_ALREADY_OPEN = 704
_NO_CONTEXT = 201
# Keys of the extra launch options: all arguments in one buffer, and the buffer's size.
_END, _BUFFER, _BUFFER_SIZE = 0, 1, 2


class Arguments:
    """Buffer of the int64 arguments of a kernel, for one launch at a time.

    Each launch fills in all of ``words``; ``options`` are the extra launch options that pass them.
    """

    __slots__ = ("_buffer", "_size", "options", "words")

    def __init__(self, count: int) -> None:
        self.words = array.array("q", bytes(8 * count))
        self._size = ctypes.c_size_t(8 * count)
        self._buffer = (ctypes.c_int64 * count).from_buffer(self.words)
        self.options = (ctypes.c_void_p * 5)(
            _BUFFER, ctypes.addressof(self._buffer),
            _BUFFER_SIZE, ctypes.addressof(self._size), _END,
        )  # fmt: skip


class Driver(DriverCalls):
    """Functions of the CUDA driver; each raises :class:`DeviceError` on failure."""

    def count(self) -> int:
        """Return the number of devices that ``CUDA_VISIBLE_DEVICES`` makes visible."""
        found = ctypes.c_int()
        if self.problem or self.library.cuDeviceGetCount(ctypes.byref(found)):
            return 0
        return found.value

    def version(self) -> tuple[int, int]:
        """Return the newest CUDA version that the driver supports."""
        number = self.get("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def name(self, device: int) -> str:
        """Return the name of a device."""
        name_buffer = ctypes.create_string_buffer(256)
        self.check("cuDeviceGetName", name_buffer, len(name_buffer), self.handle(device))
        return name_buffer.value.decode()

    def uuid(self, device: int) -> str:
        """Return the UUID of a device (or MIG instance) as 32 hexadecimal digits."""
        found = (ctypes.c_uint8 * 16)()
        self.check("cuDeviceGetUuid_v2", found, self.handle(device))
        return bytes(found).hex()

    def capability(self, device: int) -> tuple[int, int]:
        """Return the compute capability: (9, 0) for sm_90."""
        return self._attribute(device, _MAJOR), self._attribute(device, _MINOR)

    def num_multiprocessors(self, device: int) -> int:
        """Return the number of multiprocessors of a device."""
        return self._attribute(device, _NUM_MULTIPROCESSORS)

    def nbytes(self, device: int) -> int:
        """Return the memory of a device, in bytes."""
        return self.get("cuDeviceTotalMem_v2", self.handle(device), kind=ctypes.c_size_t)

    def can_reach(self, device: int, peer: int) -> bool:
        """Return whether a device can access the memory of another (peer access)."""
        return bool(self.get("cuDeviceCanAccessPeer", self.handle(device), self.handle(peer)))

    def device_of(self, address: int) -> int:
        """Return the device of an address."""
        return self._pointer_attribute(_ORDINAL, address)

    def wait(self, device: int, waiting: int, awaited: int) -> None:
        """Let a stream wait for the present work of another of its device; the host does not."""
        with self.within(device):
            event = self.get("cuEventCreate", _UNTIMED, kind=ctypes.c_void_p)
            try:
                self.check("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(awaited))
                self.check("cuStreamWaitEvent", ctypes.c_void_p(waiting), ctypes.c_void_p(event), 0)
            finally:  # the driver keeps what streams still need
                self.library.cuEventDestroy_v2(ctypes.c_void_p(event))

    def copy_each(
        self,
        device: int,
        stream: int,
        targets: Sequence[int],
        sources: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        """Copy bytes between addresses of any devices, one copy after another, on a stream.

        The copies are enqueued in one expression, during which the interpreter handles no signal:
        an interrupt comes before or after all of them. The thread's context is restored.
        """
        arguments = [[*map(ctypes.c_uint64, numbers)] for numbers in (targets, sources, sizes)]
        stream_arguments = itertools.repeat(ctypes.c_void_p(stream))
        with self.within(device):
            codes = [*map(self.library.cuMemcpyAsync, *arguments, stream_arguments)]
        for code in codes:
            self.raise_for("cuMemcpyAsync", code)

    def load(self, device: int, image: bytes, name: str) -> int:
        """Load PTX or machine code onto a device; return the handle of its kernel ``name``."""
        module, function, log = ctypes.c_void_p(), ctypes.c_void_p(), load_log.LoadLog()
        with self.beside_captures(device):
            code = self.library.cuModuleLoadDataEx(
                ctypes.byref(module), ctypes.c_char_p(image), *log.options
            )
            if code not in (0, OUT_OF_MEMORY):
                raise DeviceError(log.describe(code, self.error_name(code), name, self.version()))
            self.raise_for("cuModuleLoadDataEx", code)
            self.check("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            # Otherwise drivers since 12.4 may finish loading at the first launch, and wait for the
            # device then.
            if hasattr(self.library, "cuFuncLoad"):
                self.check("cuFuncLoad", function)
        return function.value or 0

    def num_resident_blocks(self, device: int, function: int, threads: int) -> int:
        """Return how many blocks of a loaded kernel run at once on one multiprocessor."""
        with self.within(device):
            return self.get(
                "cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.c_void_p(function), threads,
                ctypes.c_size_t(0),
            )  # fmt: skip

    def open_peer(self, device: int, peer: int) -> bool:
        """Enable a device's access to the memory of a peer; return whether it has access now."""
        if not self.can_reach(device, peer):
            return False
        context = self.context(peer)
        with self.beside_captures(device):
            return self.library.cuCtxEnablePeerAccess(context, 0) in (0, _ALREADY_OPEN)

    def is_open(self, address: int) -> bool:
        """Return whether peers may access the memory at an address.

        Peer access covers memory of ``cuMemAlloc``. Stream-ordered pools, and virtual memory that
        is mapped piece by piece, have access lists of their own.
        """
        return bool(self._pointer_attribute(_IS_OPEN, address))

    def allocate(self, device: int, nbytes: int) -> int:
        """Allocate device memory; return its address, a multiple of 256."""
        with self.beside_captures(device):
            return self.get("cuMemAlloc_v2", ctypes.c_size_t(nbytes), kind=ctypes.c_uint64)

    def free(self, device: int, address: int) -> None:
        """Free memory of a device; wait until the device no longer uses it."""
        if self.is_inherited:
            return
        with self.beside_captures(device):
            self.check("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, device: int, address: int, host: int, nbytes: int) -> None:
        """Copy host memory to a device, and wait for the copy, but for no other work."""
        stream = ctypes.c_void_p()
        with self.beside_captures(device):
            self.check("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
            try:
                self.check(
                    "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), ctypes.c_void_p(host),
                    ctypes.c_size_t(nbytes), stream,
                )  # fmt: skip
                self.check("cuStreamSynchronize", stream)
            finally:
                self.check("cuStreamDestroy_v2", stream)

    def allocate_on_host(self, device: int, nbytes: int) -> int:
        """Allocate pinned host memory in a device's context; its address is valid everywhere."""
        size = ctypes.c_size_t(nbytes)
        with self.beside_captures(device):
            return self.get("cuMemHostAlloc", size, _FOR_ALL_DEVICES, kind=ctypes.c_void_p)

    def free_on_host(self, device: int, address: int) -> None:
        """Free pinned host memory that no device uses any more."""
        if self.is_inherited:
            return
        with self.beside_captures(device):
            self.check("cuMemFreeHost", ctypes.c_void_p(address))

    def event(self, device: int) -> int:
        """Return a new event of a device, which has happened; the caller destroys it."""
        with self.within(device):
            return self.get("cuEventCreate", _UNTIMED, kind=ctypes.c_void_p)

    def record(self, lanes: Iterable[tuple[int, int, int]]) -> None:
        """Let each event happen after the present work of a stream: (device, stream, event)."""
        function, previous_context = self.library.cuEventRecord, self.current()
        try:  # one context after another, and the caller's once
            for device, stream, event in lanes:
                self.enter(device)
                code = function(ctypes.c_void_p(event), ctypes.c_void_p(stream))
                self.raise_for("cuEventRecord", code)
        finally:
            self.library.cuCtxSetCurrent(previous_context)

    def wait_for(self, lanes: Iterable[tuple[int, int, int]]) -> None:
        """Let each stream wait for an event of any device: (device, stream, event)."""
        function, previous_context = self.library.cuStreamWaitEvent, self.current()
        try:
            for device, stream, event in lanes:
                self.enter(device)
                code = function(ctypes.c_void_p(stream), ctypes.c_void_p(event), 0)
                self.raise_for("cuStreamWaitEvent", code)
        finally:
            self.library.cuCtxSetCurrent(previous_context)

    def destroy(self, device: int, event: int) -> None:
        """Destroy an event of a device; streams that wait for it are not affected."""
        if self.is_inherited:
            return
        with self.within(device):
            self.check("cuEventDestroy_v2", ctypes.c_void_p(event))

    def is_capturing(self, device: int, stream: int) -> bool:
        """Return whether a stream is being captured into a graph."""
        found = ctypes.c_int()
        with self.within(device):
            self.check("cuStreamIsCapturing", ctypes.c_void_p(stream), ctypes.byref(found))
        return found.value != 0

    def synchronize(self, device: int) -> None:
        """Wait until a device has done all its work."""
        with self.within(device):
            self.check("cuCtxSynchronize")

    def launch(
        self,
        device: int,
        function: int,
        blocks: int,
        threads: int,
        arguments: Arguments,
        stream: int,
    ) -> None:
        """Launch a kernel without waiting for it.

        The driver copies the arguments before this returns. The thread's context is restored.
        """
        previous_context = self.current()
        device_context = self.contexts.get(device)
        is_elsewhere = device_context is None or previous_context.value != device_context.value
        try:
            if is_elsewhere:
                self.enter(device)
            code = self.library.cuLaunchKernel(
                ctypes.c_void_p(function), blocks, 1, 1, threads, 1, 1, 0,
                ctypes.c_void_p(stream), None, arguments.options,
            )  # fmt: skip
        finally:
            if is_elsewhere:
                self.library.cuCtxSetCurrent(previous_context)
        self.raise_for("cuLaunchKernel", code)

    def _pointer_attribute(self, attribute: int, address: int) -> int:
        """Return an attribute of an address, also in threads without a context."""
        found = ctypes.c_int()
        arguments = ctypes.byref(found), attribute, ctypes.c_uint64(address)
        code = self.library.cuPointerGetAttribute(*arguments)
        if code == _NO_CONTEXT:
            with self.within(next(iter(self.contexts), 0)):
                code = self.library.cuPointerGetAttribute(*arguments)
        self.raise_for("cuPointerGetAttribute", code)
        return found.value

    def _attribute(self, device: int, attribute: int) -> int:
        return self.get("cuDeviceGetAttribute", attribute, self.handle(device))


def _is_set(value: str) -> bool:
    return value.strip() not in ("", "0")


_BLOCKED_AT_IMPORT = _is_set(os.environ.get("CUDA_LAUNCH_BLOCKING", ""))


def launches_block() -> bool:
    """Return whether a launch returns only when its kernel has ended: ``CUDA_LAUNCH_BLOCKING``.

    The driver reads the variable when it starts, which another library may have done before. So
    the launches count as blocking if the variable was set at the import of this module, or is now,
    to anything but 0.
    """
    return _BLOCKED_AT_IMPORT or _is_set(os.environ.get("CUDA_LAUNCH_BLOCKING", ""))


def leave_captures_alone(device: int) -> None:
    """Let the calls of this thread neither fail nor end a capture while another thread captures."""
    cuda_driver = find()
    if cuda_driver is not None:
        with cuda_driver.within(device):
            cuda_driver.exchange_capture_mode(ctypes.c_int(RELAXED))


@functools.cache
def find(names: Sequence[str] = _NAMES) -> Driver | None:
    """Return the driver, or None where none is installed.

    The first call initializes CUDA; a child process forked afterwards cannot use the GPU.
    """
    for name in names:
        try:
            return Driver(ctypes.CDLL(name))
        except OSError:
            continue
    return None
