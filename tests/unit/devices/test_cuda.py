"""CUDA devices: messages about missing parts, array descriptions, and the driver on a double."""

from __future__ import annotations

import array
import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
from kinds import daily

import dvkernels as dv
from dvkernels import errors, kernels
from dvkernels.devices import cuda, cuda_arrays, driver, stream_order

BOTH = ("numba-cuda", "cupy-cuda13x")


@pytest.mark.parametrize(
    ("version", "problem", "count", "installed", "message"),
    [
        (None, "", 0, BOTH, "no NVIDIA driver was found"),
        (None, "CUDA_ERROR_UNKNOWN", 0, BOTH, r"does not start \(CUDA_ERROR_UNKNOWN\)"),
        ((13, 0), "", 0, BOTH, "CUDA_VISIBLE_DEVICES"),
        ((13, 0), "", 1, (), r"CuPy is not installed.*CUDA 13.0.*dvkernels\[cuda13\]"),
        ((12, 4), "", 1, (), r"dvkernels\[cuda12\]"),
        ((13, 0), "", 1, ("numba-cuda",), r"CuPy is not installed.*dvkernels\[cuda13\]"),
        ((12, 4), "", 1, BOTH, r"CUDA 12.4, and the packages here are for CUDA 13.*\[cuda12\]"),
        ((11, 8), "", 1, BOTH, "CUDA 12 or later"),
    ],
)
def test_missing_parts_are_named_with_the_remedy(version, problem, count, installed, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(cuda.explain(version, problem, count, installed))


@pytest.mark.parametrize(
    "installed", [BOTH, ("numba-cuda", "cupy-cuda12x"), ("numba-cuda", "cupy"), ("cupy-cuda13x",)]
)
def test_nothing_is_missing(installed):
    assert cuda.explain((13, 0), "", 2, installed) == ""


@pytest.mark.parametrize(
    ("visible", "count"),
    daily([(None, 1), ("0", 1), ("0,1", 1), ("", 0), ("-1", 0), ("1", 0)], ("0,1", 1), ("", 0)),
)
def test_visible_devices_of_the_simulator(visible, count):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "CUDA_VISIBLE_DEVICES": visible or ""}
    if visible is None:
        del environment["CUDA_VISIBLE_DEVICES"]
    code = "import dvkernels as dv; print([str(d) for d in dv.list_devices('cuda')])"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == str([f"cuda:{k}" for k in range(count)])


@pytest.mark.skipif(cuda.devices() != [], reason="there is a GPU")
def test_without_a_gpu_naming_one_says_why():
    assert dv.list_devices("cuda") == []
    with pytest.raises(errors.DeviceError, match="the devices here are cpu:0"):
        dv.MirroredStrategy(["cuda:0"])
    with pytest.raises(errors.DeviceError, match="all_reduce"):
        kernels.all_reduce([OnGpu(), OnGpu()])


class OnGpu:
    """Array in GPU memory of an unknown library, with ``__cuda_array_interface__``."""

    def __init__(self, **other):
        self.__cuda_array_interface__ = {
            "data": (4096, False), "shape": (3,), "typestr": "<f4", "version": 3, **other,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("other", "shape", "strides", "writeable", "stream"),
    [
        ({}, (3,), (4,), True, 0),
        ({"stream": 2}, (3,), (4,), True, 2),
        ({"stream": None, "data": (4096, True)}, (3,), (4,), False, 0),
        ({"strides": (-8,)}, (3,), (-8,), True, 0),
        ({"shape": (2, 3), "strides": (0, 4)}, (2, 3), (0, 4), True, 0),
        ({"shape": (0, 3), "data": (0, False)}, (0, 3), (12, 4), True, 0),
        ({"typestr": "<c16", "shape": ()}, (), (), True, 0),
    ],
)
def test_the_array_interface_is_read(other, shape, strides, writeable, stream, monkeypatch):
    monkeypatch.setattr(driver, "find", lambda: None)
    array, device, stream_read = cuda_arrays.locate("test", [OnGpu(**other)])[0]
    assert (array.shape, array.flags.writeable, device, stream_read) == (
        shape,
        writeable,
        0,
        stream,
    )
    if array.size:
        assert array.strides == strides
        assert array.ctypes.data == 4096


def test_a_mask_would_be_ignored():
    with pytest.raises(errors.NotABufferError, match=r"replica 0.*mask"):
        cuda_arrays.locate("test", [OnGpu(mask=object())])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (np.ones(3), errors.BufferMismatchError, "replica 1 is in host memory.*on cuda:0"),
        ([1.0], errors.NotABufferError, "replica 1 is a list"),
        (None, errors.NotABufferError, "replica 1 is a NoneType"),
        (np.ma.ones(3), errors.NotABufferError, "replica 1 is a MaskedArray"),
    ],
)
def test_mixed_memory_names_the_replica_and_its_memory(wrong, error, message, monkeypatch):
    monkeypatch.setattr(driver, "find", lambda: None)
    with pytest.raises(error, match=message):
        cuda_arrays.locate("all_reduce", [OnGpu(), wrong])
    if isinstance(wrong, np.ndarray) and error is errors.BufferMismatchError:
        with pytest.raises(error, match="replica 1 is in GPU memory"):
            kernels.all_reduce([wrong, OnGpu()])


def test_streams_of_several_devices_are_ordered_each_in_its_own_context(monkeypatch):
    calls = []

    class Recorder:
        def __getattr__(self, name):
            return lambda *args: calls.append((name, *args)) or 77

    monkeypatch.setattr(driver, "find", Recorder)
    near, far, other = (stream_order.DeviceStream(*pair) for pair in [(0, 5), (1, 0), (0, 0)])
    cuda_arrays.order_streams([(near, near), (near, other), (far, other)])
    waits = [("record", [(0, 0, 77)]), ("wait_for", [(1, 0, 77)]), ("destroy", 0, 77)]
    assert calls == [("wait", 0, 5, 0), ("event", 0), *waits]


def test_streams_of_every_library():
    class OfCuPy:
        ptr = 11

    class OfTorch:
        cuda_stream = 12

    class OfNumba:
        handle = ctypes.c_void_p(13)

    class OfAnyone:
        def __cuda_stream__(self):
            return 0, 14

    given = [OfCuPy(), OfTorch(), OfNumba(), OfAnyone(), 15]
    assert stream_order.per_buffer("verb", given, 5) == [11, 12, 13, 14, 15]
    assert stream_order.per_buffer("verb", OfCuPy(), 2) == [11, 11]
    assert stream_order.per_buffer("verb", None, 2) is None
    with pytest.raises(errors.DeviceError, match="each of the 2 buffers; got 3"):
        stream_order.per_buffer("verb", [1, 2, 3], 2)
    with pytest.raises(errors.DeviceError, match="no CUDA stream"):
        stream_order.per_buffer("verb", "fast", 2)


class RecordingLibrary:
    """Driver library with two devices that records its calls."""

    def __init__(self, fails=(), code=2):
        self.calls, self.fails, self.code, self.current = [], fails, code, 77
        self.says = ""

    def __getattr__(self, name):
        def answer(*args):
            if name in self.fails:
                return self.code
            return getattr(self, f"_{name}", lambda *args: 0)(*args) or 0

        def record(*args):
            self.calls.append(name)
            return answer(*args)

        return record if name.startswith("cu") else self.__getattribute__(name)

    def _cuDeviceGetCount(self, found):
        found._obj.value = 2

    def _cuDriverGetVersion(self, found):
        found._obj.value = 12040

    def _cuDeviceGetAttribute(self, found, attribute, device):
        found._obj.value = {75: 9, 76: 0, 16: 132}[attribute]

    def _cuCtxGetCurrent(self, found):
        found._obj.value = self.current

    def _cuDevicePrimaryCtxRetain(self, found, device):
        found._obj.value = 100

    def _cuCtxSetCurrent(self, context):
        self.current = context.value

    def _cuOccupancyMaxActiveBlocksPerMultiprocessor(self, found, function, threads, nbytes):
        assert self.current == 100, "asked outside the context of the device"
        found._obj.value = 768 // threads

    def _cuGetErrorName(self, code, text):
        text._obj.value = b"CUDA_ERROR_SOMETHING"

    def _cuModuleLoadDataEx(self, module, image, count, keys, values):
        assert [*keys] == [5, 6]  # the buffer for errors, and its size
        text = self.says.encode() + b"\0"
        assert len(text) <= values[1]
        ctypes.memmove(values[0], text, len(text))
        return self.code

    def _cuLaunchKernel(self, function, *rest):
        assert self.current == 100, "launched outside the context of the device"
        options = rest[-1]
        assert [options[0], options[2], options[4]] == [1, 2, None]
        size = ctypes.c_size_t.from_address(options[3]).value
        words = (ctypes.c_int64 * (size // 8)).from_address(options[1])
        self.launched = (function.value, rest[0], rest[3], rest[7].value, list(words))


def test_a_launch_passes_its_words_and_leaves_the_context_as_it_was():
    library = RecordingLibrary()
    found = driver.Driver(library)
    assert (found.count(), found.version(), found.capability(1)) == (2, (12, 4), (9, 0))
    arguments = driver.Arguments(3)
    arguments.words[:] = array.array("q", [3, -4, 2**62])
    found.launch(1, 5, 6, 256, arguments, 9)
    assert library.launched == (5, 6, 256, 9, [3, -4, 2**62])
    assert library.current == 77
    library.current = 100  # the device's context is current already
    library.calls.clear()
    found.launch(1, 5, 6, 256, arguments, 9)
    assert library.calls == ["cuCtxGetCurrent", "cuLaunchKernel"]


def test_resident_blocks_are_asked_for_in_the_context_of_the_device():
    library = RecordingLibrary()
    assert driver.Driver(library).num_resident_blocks(1, 5, 256) == 3
    assert library.current == 77


def test_a_wait_creates_an_event_and_destroys_it():
    library = RecordingLibrary()
    driver.Driver(library).wait(0, 5, 7)
    events = [name for name in library.calls if "Event" in name]
    assert events == ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy_v2"]
    library = RecordingLibrary(fails={"cuStreamWaitEvent"}, code=400)
    with pytest.raises(errors.DeviceError, match="cuStreamWaitEvent failed with CUDA_ERROR_SOME"):
        driver.Driver(library).wait(0, 5, 7)
    assert library.calls.count("cuEventDestroy_v2") == 1
    assert library.current == 77


def test_out_of_memory_is_reported():
    library = RecordingLibrary(fails={"cuLaunchKernel"})
    with pytest.raises(errors.DeviceError, match="out of memory; free arrays"):
        driver.Driver(library).launch(0, 5, 6, 256, driver.Arguments(1), 0)
    assert library.current == 77


@pytest.mark.parametrize(
    ("code", "says", "message"),
    [
        (222, "", r"driver of CUDA 12.4 cannot load the kernel fit: CUDA_ERROR_SOMETHING; update"),
        (
            218,
            "ptxas x.ptx, line 9; error\n\n fatal\n\n1\n2",
            r"\(ptxas x.*error; fatal; 1\); update",
        ),
        (221, "", "libnvidia-ptxjitcompiler is missing"),
        (223, "", "unset CUDA_DISABLE_PTX_JIT"),
        (209, "", r"compute capability 7\.5"),
        (999, "", "report this"),
        (2, "", "out of memory; free arrays"),
    ],
)
def test_a_kernel_that_the_driver_does_not_load_is_explained(code, says, message):
    library = RecordingLibrary(code=code)
    library.says = says
    with pytest.raises(errors.DeviceError, match=message):
        driver.Driver(library).load(0, b"image", "fit")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_an_error(monkeypatch):
    found = driver.Driver(RecordingLibrary())
    monkeypatch.setattr(driver, "find", lambda: found)
    monkeypatch.setattr(cuda, "_installed", lambda: ("numba-cuda", "cupy-cuda12x"))
    assert cuda.missing() == ""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(errors.DeviceError, match=r"all_reduce: .*forked.*'spawn'"):
        cuda.require("all_reduce")


def test_a_driver_that_does_not_start():
    found = driver.Driver(RecordingLibrary(fails={"cuInit"}, code=999))
    assert (found.problem, found.count()) == ("CUDA_ERROR_SOMETHING", 0)
    assert driver.Driver(RecordingLibrary(fails={"cuInit"}, code=100)).problem == ""  # no device
    assert driver.find.__wrapped__(("libthere-is-no-such.so",)) is None
