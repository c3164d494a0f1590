"""CUDA fast path: a repeated call launches, or raises, what a first call does."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import examples

from dvkernels import errors, kernels
from dvkernels.devices import cuda, cuda_arrays, driver
from dvkernels.kernels.cuda.engine import fast_path, simulator

pytestmark = pytest.mark.skipif(simulator.IS_ON, reason="has a driver of its own")
BASE = 1 << 32


class Array:
    """Double of a CuPy array, without memory."""

    def __init__(self, address, shape=(40,), dtype="f4", strides=None, device=0):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.strides = np.empty(shape, dtype).strides if strides is None else strides
        self.data = SimpleNamespace(ptr=address, device_id=device)
        self.device = SimpleNamespace(id=device)


Array.__module__, Array.__name__ = "cupy", "ndarray"


class OfNumba:
    """Double of an array with ``__cuda_array_interface__``."""

    def __init__(self, address, shape=(40,), dtype="f4", is_read_only=False, **other):
        self.dtype = np.dtype(dtype)
        self.__cuda_array_interface__ = {
            "data": (address, is_read_only), "shape": shape, "strides": None, "version": 3,
            "typestr": self.dtype.str, **other,
        }  # fmt: skip


class Machine:
    """Double of the driver that launches nothing, and records the launches."""

    problem, is_inherited = "", False

    def __init__(self):
        self.launched, self.fails, self.loaded, self.takes_time = [], False, 0, False

    def version(self):
        return 12, 4

    def count(self):
        return 2

    def capability(self, device):
        return 9, 0

    def num_multiprocessors(self, device):
        return 4

    def num_resident_blocks(self, device, function, threads):
        assert (function, threads) == (7, 256)
        return 3

    def device_of(self, address):
        return 0

    def is_capturing(self, device, stream):
        return False

    def wait(self, device, waiting, awaited):
        self.launched.append((device, waiting, awaited))

    def launch(self, device, function, blocks, threads, arguments, stream):
        if self.fails:
            raise errors.DeviceError("cuLaunchKernel failed")
        told = arguments.words.tobytes()
        if self.takes_time:
            time.sleep(1e-5)
        self.launched.append((device, blocks, threads, arguments.words.tobytes(), stream))
        assert arguments.words.tobytes() == told, "another launch wrote to these arguments"


@pytest.fixture(scope="module")
def machine():
    from dvkernels.kernels.cuda.engine import launcher

    made = Machine()
    stream = SimpleNamespace(ptr=5)
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda device: stream))

    def prepare(kernel, device):
        made.loaded += 1
        return launcher._handles.setdefault((device, kernel), 7)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "find", lambda: made)
        patch.setattr(cuda, "_installed", lambda: ("numba-cuda", "cupy-cuda12x"))
        patch.setitem(sys.modules, "cupy", cupy)
        patch.setattr(launcher, "prepare", prepare)
        yield made
    launcher._handles.clear()


def outcome(machine, call):
    """Return the launches of a call, or its error."""
    machine.launched.clear()
    try:
        call()
    except errors.DvKernelsError as error:
        return type(error), str(error), [*machine.launched]
    return [*machine.launched]


shapes = st.sampled_from([(40,), (5, 8), (), (0,), (1 << 14,)])
arrays = st.builds(
    Array,
    st.sampled_from([0, 64, 4, (1 << 20) + 16, 30 << 20]).map(BASE.__add__),
    shapes,
    st.sampled_from(["f4", "i4", "f2"]),
    st.sampled_from([None, (8,)]),
)
ops = st.sampled_from(["sum", "mean", "MAX", "median", None, []])
given_streams = st.sampled_from([None, 9, [9, 9], "fast", SimpleNamespace(ptr=11)])


@st.composite
def calls(draw):
    shape, dtype = draw(shapes), draw(st.sampled_from(["f4", "i4", "f2", "c8"]))
    kind = draw(st.sampled_from([Array, OfNumba]))
    slots = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    made = [kind(BASE + (slot << 20), shape, dtype) for slot in slots]
    if draw(st.integers(0, 3)) == 0:
        made[draw(st.integers(0, len(made) - 1))] = draw(arrays)
    verb = draw(st.sampled_from(["all_reduce", "direct_all_reduce", "reduce"]))
    out, half = None, len(made) // 2
    if half and draw(st.booleans()):
        made, out = made[:half], made[half:] if verb != "reduce" else made[half]
    how = {"op": draw(ops), "stream": draw(given_streams), "out": out}
    if verb == "reduce" and out is None:
        how["out"] = kind(BASE + (20 << 20), shape, dtype)
    return verb, made, how


@settings(max_examples=examples(400), deadline=None)
@given(call=calls())
def test_a_repeated_call_is_like_a_fresh_one(machine, call):
    verb, buffers, how = call

    def make():
        return getattr(kernels.cuda, verb)(buffers, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_path, "repeat", lambda *_: False)
        fresh = outcome(machine, make)
    assert outcome(machine, make) == fresh


class Looked(Exception):
    pass


def looks(call):
    """Return whether a call takes the slow path."""

    def look(*given):
        raise Looked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_arrays, "locate", look)
        try:
            call()
        except Looked:
            return True
    return False


@pytest.mark.parametrize("kind", [Array, OfNumba])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_call_like_an_earlier_one_is_only_launched(machine, kind, count):
    def some(begin, **how):
        return [kind(BASE + (k << 20), **how) for k in range(begin, begin + count)]

    for out in (None, some(30)):
        kernels.all_reduce(some(0), out=out)
        assert not looks(lambda: kernels.all_reduce(some(10), out=out))  # noqa: B023
        buffers = some(20)
        before = len(machine.launched)
        assert kernels.all_reduce(buffers, out=out) == (out or buffers)
        assert len(machine.launched) == before + 1
    assert looks(lambda: kernels.all_reduce(some(0), "max"))
    assert looks(lambda: kernels.all_reduce(some(0, dtype="i8")))
    assert looks(lambda: kernels.all_reduce(some(0, shape=(4, 10))))
    assert looks(lambda: kernels.cuda.all_reduce(some(0), stream=[5] * count))


@pytest.mark.parametrize(
    ("streams", "others"), [([5], []), ([5, 5], []), ([5, 7, 5, 9, 7], [7, 9]), ([0, 2], [2])]
)
def test_streams_wait_before_and_after_the_work(machine, streams, others):
    buffers = [Array(BASE + (k << 20)) for k in range(len(streams))]
    first = streams[0]
    machine.launched.clear()
    kernels.cuda.all_reduce(buffers, stream=streams)
    before, (launch, *after) = machine.launched[: len(others)], machine.launched[len(others) :]
    assert before == [(0, first, other) for other in others]
    assert launch[-1] == first
    assert after == [(0, other, first) for other in others]


def test_what_is_not_as_before_is_looked_at(machine):
    fast_path._launches.clear()
    good = [Array(BASE), Array(BASE + 4096)]
    kernels.all_reduce(good)
    for other in (
        Array(BASE + 4096, strides=(8,)),
        Array(BASE + 4096, device=1),
        Array(BASE + 4100),
        Array(BASE + 16),  # overlaps
        OfNumba(BASE + 4096),
    ):
        assert looks(lambda: kernels.all_reduce([good[0], other]))  # noqa: B023
    four = [Array(BASE + (k << 20)) for k in range(4)]
    kernels.all_reduce(four)
    assert looks(lambda: kernels.all_reduce(four[:2], out=four[2:]))
    assert looks(lambda: kernels.reduce(four[:3], out=four[3]))
    first = OfNumba(BASE)
    kernels.all_reduce([first, OfNumba(BASE + 4096)])
    for how in ({"is_read_only": True}, {"mask": 1}, {"stream": 7}):
        other = OfNumba(BASE + 4096, **how)
        assert looks(lambda: kernels.all_reduce([first, other]))  # noqa: B023


@pytest.mark.parametrize(("count", "most"), [(2, 60), (8, 72)])
def test_a_repeated_call_calls_little(machine, count, most):
    """Functions of Python and C, 0.1 us each; a time would tell of the machine. Fresh: 390, 700."""
    buffers = [Array(BASE + (k << 20)) for k in range(count)]
    kernels.all_reduce(buffers)
    called = []
    sys.setprofile(lambda frame, event, arg: called.append(event))
    try:
        kernels.all_reduce(buffers)
    finally:
        sys.setprofile(None)
    assert sum(event.endswith("call") for event in called) <= most


def test_threads_launch_their_own_arrays(machine, monkeypatch):
    machine.launched.clear()
    kernels.all_reduce([Array(BASE), Array(BASE + 4096)])
    monkeypatch.setattr(machine, "takes_time", True)

    def work(number):
        for turn in range(200):
            address = BASE + (number << 24) + (turn << 13)
            kernels.all_reduce([Array(address), Array(address + 4096)])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    pairs = [np.frombuffer(words, np.int64) for *_, words, _ in machine.launched]
    found = {(int(a[a >= BASE][0]), int(a[a >= BASE][1])) for a in pairs}
    assert len(found) == 1 + 4 * 200
    assert all(second == first + 4096 for first, second in found)


def test_a_kernel_is_loaded_again_after_a_launch_that_failed(machine):
    buffers = [Array(BASE), Array(BASE + 4096)]
    kernels.all_reduce(buffers)
    loaded, machine.fails = machine.loaded, True
    with pytest.raises(errors.DeviceError, match="cuLaunchKernel"):
        kernels.all_reduce(buffers)
    machine.fails = False
    kernels.all_reduce(buffers)  # the device was reset, and is in use again
    assert machine.loaded == loaded + 1


def test_so_many_are_kept_and_no_more(machine):
    for length in range(1, fast_path._MAX_LAUNCHES + 50):
        kernels.all_reduce([Array(BASE, (length,)), Array(BASE + (1 << 20), (length,))])
    assert len(fast_path._launches) == fast_path._MAX_LAUNCHES


def test_a_child_of_fork_begins_with_none(machine):
    import os

    kernels.all_reduce([Array(BASE), Array(BASE + 4096)])
    assert fast_path._launches
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(len(fast_path._launches)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 9) == b"0"
    os.close(reading)
    os.close(writing)
