"""NCCL as communicator: what it is asked, by a double that does it, and what it is not asked."""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.communicators.nccl import Nccl
from dvkernels.devices import cuda
from dvkernels.errors import AlgorithmError, DeviceError
from dvkernels.testing import check_communicator


class OnDevice(np.ndarray):
    """An array with CuPy's ``data.ptr``; a device for each rank."""

    device = 0

    @property
    def data(self):
        return type("Pointer", (), {"ptr": self.ctypes.data})


class Arrays:
    def empty(self, device, shape, dtype, stream=None):
        made = np.empty(shape, dtype).view(OnDevice)
        made.device = device
        return made

    def device_of(self, array):
        return array.device

    def current(self, device):
        return type("Stream", (), {"ptr": 1000 + device})

    def at(self, device, stream=None):
        return contextlib.nullcontext()


class Library:
    """Does what NCCL does when a group ends: all ranks must have called alike."""

    NCCL_INT8, NCCL_UINT8, NCCL_INT32, NCCL_UINT32, NCCL_INT64, NCCL_UINT64 = range(6)
    NCCL_FLOAT32, NCCL_FLOAT64 = 7, 8
    NCCL_SUM, NCCL_PROD, NCCL_MAX, NCCL_MIN = range(4)
    TYPES = ("i1", "u1", "i4", "u4", "i8", "u8", None, "f4", "f8")
    COMBINE = (np.add, np.multiply, np.maximum, np.minimum)

    def __init__(self):
        self.calls, self.num_groups, self.is_open = {}, 0, False
        self.NcclCommunicator = self

    def initAll(self, devices):
        self.size = len(devices)
        return [Rank(self, rank, device) for rank, device in enumerate(devices)]

    def groupStart(self):
        assert not self.is_open
        self.calls, self.is_open = {rank: [] for rank in range(self.size)}, True

    def groupEnd(self):
        self.is_open, self.num_groups = False, self.num_groups + 1
        for calls in zip(*self.calls.values(), strict=True):
            verbs = {(verb, *rest[:-1]) for verb, _, _, *rest in calls}
            assert len(verbs) == 1, f"the ranks called differently: {verbs}"
            verb, _, _, count, kind, *rest = calls[0]
            sent = [view(call[1], count, self.TYPES[kind]).copy() for call in calls]
            if verb == "broadcast":
                into, value = range(self.size), sent[rest[0]]
            else:
                value = sent[0]
                for other in sent[1:]:
                    with np.errstate(all="ignore"):
                        value = self.COMBINE[rest[0]](value, other)
                into = range(self.size) if verb == "allReduce" else [rest[1]]
            for rank in into:
                view(calls[rank][2], count, self.TYPES[kind])[:] = value


def view(address, count, dtype):
    nbytes = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype)


class Rank:
    def __init__(self, library, rank, device):
        self.library, self.rank, self.device = library, rank, device

    def __getattr__(self, verb):
        def call(*args):
            assert self.library.is_open, "NCCL is called in groups only"
            assert args[-1] == 1000 + self.device, "work goes to the current stream of its device"
            self.library.calls[self.rank].append((verb, *args))

        return call


def gpus(count):
    return [dv.Device("cuda", k) for k in range(count)]


def placed(arrays):
    made = []
    for device, array in enumerate(arrays):
        one = np.array(array).view(OnDevice)
        one.device = device
        made.append(one)
    return made


@pytest.fixture
def three(monkeypatch):
    library = Library()
    found = Nccl(gpus(3), library, Arrays())
    monkeypatch.setattr(found, "_can_move", lambda values: True)
    return found, library


def parts(dtype="f4", length=7):
    rng = np.random.default_rng(5)
    return placed([rng.integers(1, 9, (length, 2)).astype(dtype) for _ in range(3)])


@pytest.mark.parametrize("dtype", ["f4", "f8", "i1", "u1", "i4", "u8"])
@pytest.mark.parametrize("op", [dv.ReduceOp.SUM, dv.ReduceOp.PROD])
def test_reductions(three, dtype, op):
    nccl, library = three
    values = parts(dtype)
    with np.errstate(all="ignore"):
        right = {"sum": np.add, "prod": np.multiply}[op.value].reduce(np.stack(values), dtype=dtype)
    for found in (*nccl.all_reduce(values, op), nccl.reduce(values, op)):
        np.testing.assert_array_equal(found, right)
    for found, part in zip(nccl.reduce_scatter(values, op), np.array_split(right, 3), strict=True):
        np.testing.assert_array_equal(found, part)
    assert library.num_groups == 3


def test_a_mean_is_a_sum_divided_once(three):
    nccl, _ = three
    values = parts()
    out = placed([np.zeros((7, 2), "f4")] * 3)
    assert all(
        a is b for a, b in zip(nccl.all_reduce(values, dv.ReduceOp.MEAN, out), out, strict=True)
    )
    for found in out:
        np.testing.assert_array_equal(found, np.sum(values, 0, dtype="f4") / np.float32(3))


def test_movements(three):
    nccl, _ = three
    values = [parts("f2", length)[k] for k, length in enumerate((2, 0, 5))]
    for found in nccl.all_gather(values, 0):
        np.testing.assert_array_equal(found, np.concatenate(values))
    values = parts("c8")
    for found in nccl.broadcast(values, 2):
        np.testing.assert_array_equal(found, values[2])


@pytest.mark.parametrize(
    ("dtype", "op"),
    [("f2", "sum"), ("c8", "sum"), ("f4", "max"), ("i2", "sum"), ("?", "min")],
)
def test_what_nccl_does_otherwise_is_left_to_the_kernels(three, monkeypatch, dtype, op):
    nccl, library = three
    asked = []

    class Kernels:
        def all_reduce(self, values, op, out):
            asked.append(op)
            return list(values)

    monkeypatch.setattr(nccl, "_kernels", Kernels())
    nccl.all_reduce(parts(dtype), dv.ReduceOp.of(op))
    assert asked
    assert library.num_groups == 0


def test_arrays_of_the_host_keep_all_laws():
    check_communicator(lambda size: Nccl(gpus(size), Library(), Arrays()), sizes=[1, 3])


@pytest.mark.parametrize("devices", [["cuda", 0, "cuda", 0], ["cpu", 0, "cpu", 1]])
def test_each_rank_needs_its_own_gpu(devices):
    pair = [dv.Device(devices[0], devices[1]), dv.Device(devices[2], devices[3])]
    with pytest.raises(AlgorithmError, match="GPU of its own"):
        Nccl(pair, Library(), Arrays())


@pytest.mark.skipif(not cuda.missing(), reason="there is a GPU")
def test_without_a_gpu_it_is_said_what_is_missing():
    with pytest.raises(AlgorithmError, match="GPU of its own"):
        dv.MirroredStrategy(["cpu:0", "cpu:1"], cross_device_ops="nccl")
    with pytest.raises(DeviceError, match="driver"):
        Nccl(gpus(2))
