"""Streams, captures and launches of calls on GPU arrays, over a double of the driver."""

from __future__ import annotations

import ctypes
import threading

import pytest
from driver_double import Array, Gpus, Tensor

from dvkernels import errors, kernels
from dvkernels.devices import driver
from dvkernels.kernels.cuda.engine import simulator

pytestmark = pytest.mark.skipif(simulator.IS_ON, reason="has a driver of its own")


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


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_flags_of_a_call_that_was_left_half_way_are_too_old_for_the_next(gpus, error):
    gpus.streams()
    buffers, launch, epochs = [Array(gpus, 0), Array(gpus, 1)], gpus.library._cuLaunchKernel, []

    def failing(*args):
        words = (ctypes.c_int64 * 3).from_address(args[-1][1])
        epochs.append(words[2])  # behind the mark of a short table and the program
        if len(epochs) == 2 and error is not None:
            raise error
        return errors_left.pop() if len(epochs) == 2 else launch(*args)

    errors_left = [999]
    gpus.library._cuLaunchKernel = failing
    with pytest.raises(error or errors.DeviceError):
        kernels.all_reduce(buffers)
    with pytest.raises(errors.CollectiveTimeoutError, match="aborted"):
        kernels.all_reduce(buffers)
    kernels.cuda.recover()
    gpus.library.calls.clear()
    kernels.all_reduce(buffers)
    names = [name for name, _ in gpus.library.calls if name in ("cuFuncLoad", "cuLaunchKernel")]
    assert names == ["cuFuncLoad"] * (error is None) + ["cuLaunchKernel"] * 2
    num_stages = 1  # of one-shot, which the first rank may have signalled
    assert epochs[2:] == [epochs[0] + num_stages] * 2


@pytest.mark.parametrize(("value", "blocks"), [("1", True), ("2", True), ("0", False), ("", False)])
def test_no_kernel_waits_for_another_where_launches_block(gpus, monkeypatch, value, blocks):
    gpus.streams()
    monkeypatch.setattr(driver, "_BLOCKED_AT_IMPORT", False)
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
