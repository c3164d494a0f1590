"""Double of the CUDA driver's library: contexts of threads, streams, events, and captures.

The handles 0, 1 and 2 are default streams of the current context. A stream knows the work that
certainly comes before its next one; an event carries what its stream knew.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
from types import SimpleNamespace

import numpy as np

from dvkernels.devices import cuda, driver
from dvkernels.devices.driver import Driver

DEFAULT_STREAMS = (0, 1, 2)
NO_CONTEXT, INVALID_HANDLE = 201, 400
UNSUPPORTED, ISOLATION, IMPLICIT = 900, 905, 906  # of captures
NEED_NO_CONTEXT = ("cuInit", "cuDevice", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuGetErrorName")
# Forbidden while a stream is captured, unless the thread's mode is "relaxed".
UNSAFE = (
    "cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc", "cuMemFreeHost", "cuModuleLoadData",
    "cuEventQuery",
)  # fmt: skip
RELAXED = 2


class DriverLibrary:
    """Library of the driver with several devices; ``calls`` lists (function, device)."""

    def __init__(self, num_devices=2):
        self._thread = threading.local()
        self._num_devices, self._handles = num_devices, itertools.count(1000)
        self.calls, self.streams, self.events, self.memory = [], {}, {}, {}
        self.past, self.launched, self.epochs = {}, [], []
        self.captured, self.is_invalidated = set(), False

    # -- what the test does ----------------------------------------------------------------------

    @property
    def current(self):
        """The device of this thread's current context, or None."""
        return getattr(self._thread, "device", None)

    @current.setter
    def current(self, device):
        self._thread.device = device

    def stream(self, device):
        handle = next(self._handles)
        self.streams[handle] = device
        return handle

    def work(self, device, stream, name):
        """Put work on a stream; return the work that certainly comes before it."""
        past = self.past.setdefault((device, stream), set())
        before = {*past}
        past.add(name)
        return before

    # -- what the driver does --------------------------------------------------------------------

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*args):
            self.calls.append((name, self.current))
            if self.current is None and not name.startswith(NEED_NO_CONTEXT):
                return NO_CONTEXT
            if name in UNSAFE and self.captured and getattr(self._thread, "mode", 0) != RELAXED:
                return self._invalidate(UNSUPPORTED)
            return getattr(self, f"_{name}", lambda *_: 0)(*args) or 0

        setattr(self, name, function)  # as a CDLL does
        return function

    def _invalidate(self, code):
        self.is_invalidated = True
        return code

    def _place(self, stream):
        """Return the device and the stream of a handle, or None if there is no such stream."""
        handle = stream.value or 0
        if handle in DEFAULT_STREAMS:
            return self.current, handle
        return (self.streams[handle], handle) if handle in self.streams else None

    def _cuDeviceGetCount(self, found):
        found._obj.value = self._num_devices

    def _cuDeviceGet(self, found, device):
        found._obj.value = device

    def _cuDeviceCanAccessPeer(self, found, device, peer):
        found._obj.value = 1

    def _cuDeviceGetAttribute(self, found, attribute, device):
        found._obj.value = {75: 9, 76: 0, 16: 132}[attribute]

    def _cuDevicePrimaryCtxRetain(self, found, device):
        found._obj.value = 100 + device

    def _cuCtxGetCurrent(self, found):
        found._obj.value = None if self.current is None else 100 + self.current

    def _cuCtxSetCurrent(self, context):
        self.current = None if context.value is None else context.value - 100

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        before = getattr(self._thread, "mode", 0)
        self._thread.mode, mode._obj.value = mode._obj.value, before

    def _cuPointerGetAttribute(self, found, attribute, address):
        found._obj.value = self.memory[address.value][0] if attribute == 9 else 1

    def _allocate(self, found, size):
        room = ctypes.create_string_buffer(size.value + 256)
        found._obj.value = ctypes.addressof(room) + -ctypes.addressof(room) % 256
        self.memory[found._obj.value] = (self.current, room)

    _cuMemAlloc_v2 = _allocate

    def _cuMemHostAlloc(self, found, size, flags):
        self._allocate(found, size)

    def _cuMemFree_v2(self, address):
        return 0 if self.memory.pop(address.value)[0] == self.current else INVALID_HANDLE

    _cuMemFreeHost = _cuMemFree_v2

    def _cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)

    def _cuEventCreate(self, found, flags):
        found._obj.value = next(self._handles)
        self.events[found._obj.value] = [self.current, set(), False]

    def _cuEventRecord(self, event, stream):
        place = self._place(stream)
        if place is None or place[0] != self.events[event.value][0]:
            return INVALID_HANDLE
        known = {*self.past.get(place, ())}
        self.events[event.value][1:] = known, place in self.captured
        return 0

    def _cuStreamWaitEvent(self, stream, event, flags):
        place = self._place(stream)
        if place is None:
            return INVALID_HANDLE
        _, known, is_captured = self.events[event.value]
        if place in self.captured and not is_captured:
            return self._invalidate(ISOLATION)
        if is_captured and place[1] in DEFAULT_STREAMS:
            return self._invalidate(IMPLICIT)
        if is_captured:
            self.captured.add(place)
        self.past.setdefault(place, set()).update(known)
        return 0

    def _cuEventDestroy_v2(self, event):
        return 0 if self.events.pop(event.value)[0] == self.current else INVALID_HANDLE

    def _cuStreamIsCapturing(self, stream, found):
        place = self._place(stream)
        if place[1] == 0 and any(device == place[0] for device, _ in self.captured):
            return IMPLICIT
        found._obj.value = place in self.captured
        return 0

    def _cuGetErrorName(self, code, text):
        text._obj.value = f"CUDA_ERROR_{code}".encode()

    def _cuLaunchKernel(self, function, *rest):
        place = self._place(rest[7])
        if place is None:
            return INVALID_HANDLE
        self.launched.append(place)
        # Of a launch between GPUs: behind the mark of a short table and the program's address.
        self.epochs.append((ctypes.c_int64 * 3).from_address(rest[-1][1])[2])
        self.work(*place, len(self.launched))
        return 0


class Array:
    """Double of a CuPy array on GPUs of the double."""

    def __init__(self, gpus, device, length=40, skip=0, dtype="f4"):
        self.shape, self.dtype = (length,), np.dtype(dtype)
        self.strides = (self.dtype.itemsize,)
        start = gpus.driver.allocate(device, length * self.dtype.itemsize + skip)
        self.data = SimpleNamespace(ptr=start + skip, device_id=device)
        self.device = SimpleNamespace(id=device)


class Tensor:
    """Double of a tensor of PyTorch."""

    is_cuda, dtype = True, "torch.float32"

    def __init__(self, address, shape, device=0):
        self.shape, self.device, self._address = tuple(shape), device, address

    def data_ptr(self):
        return self._address

    def stride(self):
        return (1,)

    def get_device(self):
        return self.device

    def is_conj(self):
        return False

    is_neg = is_conj


Array.__module__, Array.__name__ = "cupy", "ndarray"
Tensor.__module__ = "torch"


class Gpus:
    """Two GPUs; each library has a current stream on each of them."""

    def __init__(self, patch):
        self.library = DriverLibrary()
        self.driver = Driver(self.library)
        self.current = {0: 0, 1: 0}
        self.loaded = {}
        patch.setattr(driver, "find", lambda: self.driver)
        patch.setattr(cuda, "_installed", lambda: ("numba-cuda", "cupy-cuda13x"))
        patch.setattr(cuda, "missing", lambda: "")
        patch.setattr(cuda, "arrays", lambda: self)
        from dvkernels.kernels.cuda.engine import launcher
        from dvkernels.kernels.cuda.multi_gpu import all_reduce

        patch.setattr(all_reduce, "_groups", {})
        patch.setattr(launcher, "_handles", self.loaded)
        patch.setattr(launcher, "prepare", self.prepare)
        stream_of = SimpleNamespace(
            get_current_stream=lambda device: SimpleNamespace(ptr=self.current[device]),
            current_stream=lambda device: SimpleNamespace(cuda_stream=self.current[device]),
        )
        patch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=stream_of))
        torch = SimpleNamespace(cuda=stream_of, empty=self.torch_empty)
        patch.setitem(sys.modules, "torch", torch)

    def prepare(self, kernel, device):
        if (device, kernel) not in self.loaded:
            self.loaded[device, kernel] = self.driver.load(device, b"", "") or 7
        return self.loaded[device, kernel]

    def empty(self, device, shape, dtype, stream=None):
        before, self.library.current = self.library.current, device
        found = SimpleNamespace(_obj=SimpleNamespace(value=0))
        assert self.library.cuMemAlloc_v2(found, SimpleNamespace(value=256)) == 0
        self.library.current = before
        array = Array(self, device, shape[0], dtype=dtype)
        return array

    def torch_empty(self, shape, dtype, device):
        """Return a tensor of a pool that allocates during captures too."""
        return Tensor(self.driver.allocate(device, 4 * shape[0]), shape, device)

    def streams(self):
        """Make new streams current on both GPUs."""
        self.current = {device: self.library.stream(device) for device in range(2)}
        return [*self.current.items()]
