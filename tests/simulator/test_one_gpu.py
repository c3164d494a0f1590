"""Kernels within one simulated GPU: launches, pieces, alignment, the array library."""

from __future__ import annotations

import functools
import importlib
import os
import threading
import types

import ml_dtypes
import numpy as np
import pytest

import dvkernels as dv
from dvkernels import errors, kernels
from dvkernels.devices import cuda, cuda_arrays
from dvkernels.kernels.cuda.engine import elements, job, launch_table, launcher
from dvkernels.kernels.cuda.engine.call import NEW
from dvkernels.schedules import partition, ring
from dvkernels.testing import check_arrays

pytestmark = pytest.mark.skipif(
    os.environ.get("NUMBA_ENABLE_CUDASIM") != "1", reason="needs the simulator"
)
REPLICAS = 3


def on_device(arrays):
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    return [FakeCUDAArray(array) for array in arrays]


@pytest.fixture
def launches(monkeypatch):
    """Return the list to which the words of every launch are appended."""
    seen, launch = [], launcher.launch

    def recording(kernel, device, blocks, words, stream):
        seen.append(list(words))
        launch(kernel, device, blocks, words, stream)

    monkeypatch.setattr(launcher, "launch", recording)
    return seen


def test_the_array_library_of_the_simulator():
    check_arrays(cuda.arrays())


def test_an_array_library_that_shares_memory_is_found():
    class Shared:
        def __getattr__(self, name):
            return getattr(cuda.arrays(), name)

        def empty(self, device, shape, dtype, stream=None):
            memory = self.__dict__.setdefault((shape, str(dtype)), np.empty(shape, dtype))
            return on_device([memory])[0]

    with pytest.raises(AssertionError, match="share memory"):
        check_arrays(Shared())


def test_devices_are_listed():
    assert dv.list_devices("cuda") == [dv.Device("cuda", 0)]
    with pytest.raises(errors.DeviceError, match="no device cuda:1"):
        dv.MirroredStrategy(["cuda:1"])


@pytest.mark.parametrize(
    "call",
    [
        lambda buffers: kernels.all_reduce(buffers),
        lambda buffers: kernels.ring_all_reduce(buffers),
        lambda buffers: kernels.reduce(buffers),
        lambda buffers: kernels.broadcast(buffers),
        lambda buffers: kernels.reduce_scatter(buffers),
        lambda buffers: kernels.all_gather(buffers, 1),
        lambda buffers: kernels.all_to_all(buffers),
        lambda buffers: kernels.all_reduce_many([buffers, buffers_of(40)]),
        lambda buffers: kernels.cuda.optimizers.adam(
            [buffers], [buffers_of(24)], [buffers_of(24)], [buffers_of(24)], step=1,
            learning_rate=0.1,
        ),
    ],
)  # fmt: skip
def test_every_verb_is_one_launch(call, launches):
    call(on_device(np.ones((REPLICAS, 4, 6), "f4")))
    assert len(launches) == 1


def buffers_of(length):
    shape = (4, 6) if length == 24 else (length,)
    return on_device([np.zeros(shape, "f4") for _ in range(REPLICAS)])


def test_two_dtypes_are_two_launches(launches):
    kernels.all_reduce_many([buffers_of(3), on_device([np.zeros(2) for _ in range(3)])])
    assert len(launches) == 2


@pytest.mark.parametrize(
    "offsets", [(0, 0, 0), (4, 4, 4), (12, 12, 12), (0, 4, 8), (1, 1, 1), (0, 0, 2)]
)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 17, 64, 131])
def test_any_alignment_and_length_and_no_write_outside(offsets, length, launches):
    expected = np.zeros(length, "f4")
    memories, buffers = [], []
    for replica, offset in enumerate(offsets):
        memory = np.full(length * 4 + 64, 0xA5, np.uint8)
        start = -memory.ctypes.data % 16 + offset
        buffer = np.ndarray((length,), "f4", memory, start)
        buffer[:] = np.arange(length) + replica
        expected += buffer
        memories.append((memory, start))
        buffers.append(buffer)
    kernels.all_reduce(on_device(buffers))
    for (memory, start), buffer in zip(memories, buffers, strict=True):
        assert (buffer == expected).all()
        assert (np.delete(memory, np.s_[start : start + 4 * length]) == 0xA5).all()
    # Buffers that are misaligned for float32 are copied in and out.
    copied = sum(offset % 4 != 0 for offset in offsets)
    assert len(launches) == 1 + 2 * copied
    if len({*offsets}) == 1 and not copied:
        header, head, item = (
            launch_table.TableHeader,
            launch_table.ItemHead,
            launch_table.ItemRecord,
        )
        record = head._make(launches[0][len(header._fields) :][:2]).record
        num_axes, before, vectors, after, _ = item._make(launches[0][record:][:5])
        assert (num_axes, before + 4 * vectors + after) == (0, length)
        assert before < 4
        assert after < 4


def test_a_misaligned_vector_is_refused_as_on_a_device():
    memory = np.zeros(64, np.uint8)
    address = memory.ctypes.data + -memory.ctypes.data % 16
    with pytest.raises(ValueError, match="multiple"):
        elements.load(address + 8, 10, True)
    with pytest.raises(ValueError, match="multiple"):
        elements.load(address + 2, 10, False)


def items_of(sizes):
    return [job.Item((), 0, size, 0, (16 * k, 16 * k)) for k, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [(1,), (0, 0), (7, 0, 4096), (1 << 22,), (5000, 1, 300_000)])
@pytest.mark.parametrize("num_resident", [1, 2, 396])
def test_pieces_cover_every_unit_once(sizes, num_resident):
    counts = job.Counts(2, 2, 0, 1)
    blocks, words = job.lay_out(items_of(sizes), counts, 256, num_resident)
    length = len(launch_table.TableHeader._fields)
    header = launch_table.TableHeader._make(words[:length])
    per_piece = 256 * header.per_thread
    heads = words[length : length + 2 * header.num_items : 2]
    ends = [*heads[1:], header.num_pieces]
    for size, first, end in zip(sizes, heads, ends, strict=True):
        assert end - first == max(1, -(-size // per_piece))
    # A whole number of blocks on each multiprocessor, or a block for each piece.
    assert blocks == min(header.num_pieces, 4 * num_resident)
    assert (header.per_thread == 4) == (2 * sum(-(-size // 1024) for size in sizes) >= num_resident)


def test_items_with_axes_are_cut_at_the_largest_length(monkeypatch):
    monkeypatch.setattr(job, "_LONGEST", 10)
    buffers = [np.arange(120.0).reshape(5, 24)[:, ::2] + k for k in range(2)]
    expected = buffers[0] + buffers[1]
    kernels.all_reduce(on_device(buffers))
    assert (buffers[0] == expected).all()
    assert (buffers[1] == expected).all()


def test_threads_share_the_simulator():
    import threading

    wrong = []

    def work():
        for _ in range(5):
            buffers = [np.arange(40.0) for _ in range(2)]
            kernels.all_reduce(on_device(buffers))
            wrong.extend(buffer for buffer in buffers if (buffer != 2 * np.arange(40.0)).any())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_the_ring_adds_each_chunk_in_the_order_of_its_schedule():
    rng = np.random.default_rng(2)
    values = [
        (rng.standard_normal(90) * 4.0 ** rng.integers(-6, 7, 90)).astype("f4") for _ in "abc"
    ]
    chunks = zip(partition.parts(90, 3), ring.chains(3), strict=True)
    expected = np.concatenate(
        [functools.reduce(np.add, [values[k][start:stop] for k in chain])
         for (start, stop), chain in chunks]
    )  # fmt: skip
    assert (expected != values[0] + values[1] + values[2]).any()
    for result in kernels.ring_all_reduce(on_device([value.copy() for value in values])):
        assert np.asarray(result._ary).tobytes() == expected.tobytes()


class OfJax:
    """Double of an array of JAX on the GPU: immutable, on a stream that nobody else knows."""

    __module__ = "jaxlib._jax"

    def __init__(self, content, events):
        self._content, self._events = content, events
        self.shape, self.dtype = content.shape, content.dtype

    def __dlpack_device__(self):
        return 2, 0

    def block_until_ready(self):
        self._events.append("ready")
        return self

    def unsafe_buffer_pointer(self):
        return self._content.ctypes.data


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
@pytest.mark.parametrize("verb", ["reduce", "all_gather", "reduce_scatter", "all_to_all", "NEW"])
def test_a_call_on_arrays_of_jax_waits_before_and_after_its_work(monkeypatch, verb, dtype):
    events, launch = [], launcher.launch
    monkeypatch.setattr(
        launcher, "launch", lambda *args: events.append("launched") or launch(*args)
    )
    stream = types.SimpleNamespace(synchronize=lambda: events.append("synchronized"))
    monkeypatch.setattr(type(cuda.arrays()), "stream_at", lambda *_: stream)
    monkeypatch.setattr(
        cuda_arrays, "like", lambda result, _: events.append("handed over") or result.get()
    )
    contents = [np.full(40, k + 1, dtype) for k in range(2)]
    arrays = [OfJax(content, events) for content in contents]
    if verb == "NEW":
        results = kernels.cuda.all_reduce(arrays, out=NEW)
        expected = [np.full(40, 3, dtype)] * 2
    else:
        results = getattr(kernels.cuda, verb)(arrays)
        expected = getattr(kernels.cpu, verb)(contents)
    if verb == "reduce":
        results, expected = [results], [expected]
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, right)
    begun = events.index("launched")
    assert {*events[:begun]} == {"ready"}
    assert events[begun:] == ["launched", "synchronized", *["handed over"] * len(results)]


def test_arrays_of_jax_are_not_overwritten():
    arrays = [OfJax(np.ones(3), []) for _ in range(2)]
    with pytest.raises(errors.BufferMismatchError, match="read-only"):
        kernels.all_reduce(arrays)


def test_a_function_of_another_module_is_run_by_several_threads_of_a_block():
    cuda_of = importlib.import_module("dvkernels.kernels.cuda.engine.cuda_target").cuda
    other = types.ModuleType("other")
    other.cuda, other.has_entered, other.has_returned = (
        cuda_of, threading.Event(), threading.Event()
    )  # fmt: skip
    exec(
        "def own_index():\n"
        "    if cuda.threadIdx.x == 0:\n"
        "        has_entered.wait(10)\n"
        "        return 0\n"
        "    has_entered.set()\n"
        "    has_returned.wait(10)\n"
        "    return cuda.threadIdx.x\n",
        vars(other),
    )
    own_index = cuda_of.jit(device=True)(other.own_index)
    found = np.full(2, -1)

    def run(found):
        index = own_index()
        found[index] = index
        other.has_returned.set()

    cuda_of.jit(run)[1, 2](found)
    assert found.tolist() == [0, 1]
    assert other.cuda is cuda_of
