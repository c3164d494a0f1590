"""Streams, captures and launches of calls on GPU arrays, over a double of the driver."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from driver_double import DriverLibrary

from dvkernels import errors, kernels
from dvkernels.devices import cuda, driver
from dvkernels.devices.driver import Driver
from dvkernels.kernels.cuda.engine import intrinsics
from dvkernels.kernels.cuda.multi_gpu import all_reduce

pytestmark = pytest.mark.skipif(intrinsics.SIMULATED, reason="has a driver of its own")


class Array:
    """Double of a CuPy array."""

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

    def __init__(self, monkeypatch):
        self.library = DriverLibrary()
        self.driver = Driver(self.library)
        self.current = {0: 0, 1: 0}
        self.loaded = {}
        monkeypatch.setattr(driver, "find", lambda: self.driver)
        monkeypatch.setattr(cuda, "_installed", lambda: ("numba-cuda", "cupy-cuda13x"))
        monkeypatch.setattr(cuda, "missing", lambda: "")
        monkeypatch.setattr(cuda, "arrays", lambda: self)
        monkeypatch.setattr(all_reduce, "_groups", {})
        from dvkernels.kernels.cuda.engine import launcher

        monkeypatch.setattr(launcher, "_handles", self.loaded)
        monkeypatch.setattr(launcher, "prepare", self.prepare)
        stream_of = SimpleNamespace(
            get_current_stream=lambda device: SimpleNamespace(ptr=self.current[device]),
            current_stream=lambda device: SimpleNamespace(cuda_stream=self.current[device]),
        )
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=stream_of))
        torch = SimpleNamespace(cuda=stream_of, empty=self.torch_empty)
        monkeypatch.setitem(sys.modules, "torch", torch)

    def prepare(self, kernel, device):
        return self.loaded.setdefault((device, kernel), self.driver.load(device, b"", "") or 7)

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


@pytest.fixture
def gpus(monkeypatch):
    return Gpus(monkeypatch)


def test_a_call_between_gpus_comes_after_the_last_whatever_became_of_its_streams(gpus):
    buffers = [Array(gpus, 0), Array(gpus, 1)]
    streams = gpus.streams()
    kernels.all_reduce(buffers)
    launched = {*gpus.library.launched}
    assert launched == {*streams}
    for device, handle in streams:  # their strategy has ended; new streams get the same handles
        del gpus.library.streams[handle], gpus.library.past[device, handle]
    others = gpus.streams()
    for device, handle in streams:
        gpus.library.streams[handle] = device
    for turn, now in enumerate([others, streams, others], 1):
        gpus.current = dict(now)
        kernels.all_reduce(buffers)
        for device, stream in now:
            own = gpus.library.launched.index((device, stream), 2 * turn) + 1
            earlier = {
                k for k in range(1, 2 * turn + 1) if gpus.library.launched[k - 1][0] == device
            }
            assert {*earlier, own} <= gpus.library.past[device, stream]


def test_calls_of_two_groups_are_not_launched_crosswise(gpus):
    gpus.streams()
    forward, backward = [Array(gpus, 0), Array(gpus, 1)], [Array(gpus, 1), Array(gpus, 0)]
    kernels.all_reduce(forward)  # all is loaded and allocated
    kernels.all_reduce(backward)
    gpus.library.launched.clear()
    launch, started = gpus.library._cuLaunchKernel, threading.Event()
    other = threading.Thread(target=lambda: (started.set(), kernels.all_reduce(backward)))

    def slow(*args):
        if not started.is_set():
            other.start()
            started.wait()
            other.join(0.1)  # it would launch now, if it could
        return launch(*args)

    gpus.library._cuLaunchKernel = slow
    kernels.all_reduce(forward)
    other.join()
    assert [device for device, _ in gpus.library.launched] == [0, 1, 1, 0]


@pytest.mark.parametrize(("value", "blocks"), [("1", True), ("2", True), ("0", False), ("", False)])
def test_no_kernel_waits_for_another_where_launches_block(gpus, monkeypatch, value, blocks):
    gpus.streams()
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", value)
    num_events = len(gpus.library.events)
    kernels.all_reduce([Array(gpus, 0), Array(gpus, 1)])
    recorded = [name for name, _ in gpus.library.calls].count("cuEventRecord")
    assert (recorded > 2) == blocks
    assert len(gpus.library.events) == num_events + 2  # one a rank, for the next call


class TestCaptures:
    def capture(self, gpus, *streams):
        gpus.library.captured = {*streams}
        gpus.library.launched.clear()

    def test_calls_in_place_and_with_out_are_one_launch(self, gpus):
        stream, _ = gpus.streams()
        arrays = [Array(gpus, 0) for _ in range(4)]
        for _ in range(2):  # the first takes the slow path, and loads the kernel in the capture
            self.capture(gpus, stream)
            kernels.all_reduce(arrays[:2])
            kernels.reduce(arrays[:2], out=arrays[2])
            kernels.reduce_scatter(arrays[:2], out=[Array(gpus, 0, 20), Array(gpus, 0, 20)])
            assert gpus.library.launched == [stream] * 3
            assert not gpus.library.is_invalidated

    @pytest.mark.parametrize("verb", ["reduce", "all_gather", "reduce_scatter", "all_to_all"])
    def test_new_arrays_are_refused_before_anything_is_touched(self, gpus, verb):
        stream, _ = gpus.streams()
        arrays = [Array(gpus, 0) for _ in range(2)]
        self.capture(gpus, stream)
        with pytest.raises(errors.DeviceError, match=r"captured into a CUDA graph.*pass out="):
            getattr(kernels, verb)(arrays)
        assert gpus.library.launched == []
        assert not gpus.library.is_invalidated

    def test_new_tensors_come_from_the_pool_of_pytorch(self, gpus):
        stream, _ = gpus.streams()
        tensors = [Tensor(gpus.driver.allocate(0, 160), (40,)) for _ in range(2)]
        self.capture(gpus, stream)
        results = [kernels.reduce(tensors), *kernels.all_gather(tensors)]
        assert [type(result) for result in results] == [Tensor] * 3
        assert gpus.library.launched == [stream] * 2
        assert not gpus.library.is_invalidated

    def test_hidden_copies_of_arrays_that_are_not_aligned_are_refused(self, gpus):
        stream, _ = gpus.streams()
        self.capture(gpus, stream)
        with pytest.raises(errors.DeviceError, match="aligned"):
            kernels.all_reduce([Array(gpus, 0), Array(gpus, 0, skip=2)])
        assert gpus.library.launched == []
        assert not gpus.library.is_invalidated

    @pytest.mark.parametrize("captured", [0, 1])
    @pytest.mark.parametrize("is_far", [False, True])
    def test_other_streams_join_and_are_joined(self, gpus, captured, is_far):
        streams = [(0, gpus.library.stream(0)), (int(is_far), gpus.library.stream(int(is_far)))]
        arrays = [Array(gpus, device) for device, _ in streams]
        handles = [stream for _, stream in streams]
        kernels.cuda.all_reduce(arrays, stream=handles)
        self.capture(gpus, streams[captured])
        kernels.cuda.all_reduce(arrays, stream=handles)
        assert gpus.library.captured == {*streams}
        assert not gpus.library.is_invalidated
        launched = {*range(1, len(gpus.library.launched) + 1)}
        assert launched <= gpus.library.past[streams[captured]], "all are joined to the first"
        gpus.library.captured = set()
        kernels.cuda.all_reduce(arrays, stream=handles)  # awaits no event of the capture

    @pytest.mark.parametrize("is_far", [False, True])
    def test_a_default_stream_cannot_join(self, gpus, is_far):
        own, far = gpus.library.stream(0), int(is_far)
        arrays = [Array(gpus, 0), Array(gpus, far)]
        self.capture(gpus, (0, own))
        with pytest.raises(errors.DeviceError, match=r"captur"):
            kernels.cuda.all_reduce(arrays, stream=[own, 0])
        assert gpus.library.launched == []
        assert not gpus.library.is_invalidated

    def test_the_first_call_of_another_thread_leaves_a_capture_alone(self, gpus):
        gpus.streams()
        self.capture(gpus, (0, gpus.library.stream(0)))
        kernels.all_reduce([Array(gpus, 0), Array(gpus, 1)])
        assert len(gpus.library.launched) == 2
        assert not gpus.library.is_invalidated
