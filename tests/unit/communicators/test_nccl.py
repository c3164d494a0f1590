"""NCCL communicator within one process, over a double of NCCL: its calls and its fallback."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from nccl_double import Arrays, Library, can_move, gpus, placed

import dvkernels as dv
from dvkernels.communicators.nccl.communicator import Nccl
from dvkernels.devices import cuda
from dvkernels.errors import AlgorithmError, DeviceError, WorkerLostError
from dvkernels.kernels.cuda.engine import launcher
from dvkernels.testing import check_communicator


@pytest.fixture
def three(monkeypatch):
    library = Library()
    monkeypatch.setattr(Nccl, "_can_move", can_move)
    return Nccl(gpus(3), library, Arrays(library)), library


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


def test_no_other_thread_launches_between_the_ranks_of_a_call(three, monkeypatch):
    nccl, library = three
    group_start, is_free = library.groupStart, []

    def start():
        ask = lambda: is_free.append(launcher.launching.acquire(blocking=False))  # noqa: E731
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        group_start()

    library.groupStart = start
    nccl.all_reduce(parts(), dv.ReduceOp.SUM)
    assert is_free == [False]
    assert launcher.launching.acquire(blocking=False)
    launcher.launching.release()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_is_left_half_way_ends_the_ranks_that_were_enqueued(three, error):
    nccl, library = three
    library.is_patient = False
    comms = nccl._comms._comms

    def fail(*_):
        raise error

    comms[1].allReduce = fail
    with pytest.raises(error):
        nccl.all_reduce(parts(), dv.ReduceOp.SUM)
    assert all(comm.is_aborted for comm in comms)
    with pytest.raises(WorkerLostError, match=r"left half-way.*make a new strategy"):
        nccl.all_reduce(parts(), dv.ReduceOp.SUM)


def test_a_mean_is_a_sum_divided_once(three):
    nccl, _ = three
    values = parts()
    out = placed(np.zeros((3, 7, 2), "f4"))
    assert all(
        a is b for a, b in zip(nccl.all_reduce(values, dv.ReduceOp.MEAN, out), out, strict=True)
    )
    for found in out:
        np.testing.assert_array_equal(found, np.sum(values, 0, dtype="f4") / np.float32(3))


def test_all_gather_and_broadcast(three):
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
def test_what_nccl_does_differently_is_left_to_the_kernels(three, monkeypatch, dtype, op):
    nccl, library = three
    asked = []

    class Kernels:
        def all_reduce(self, values, op, out):
            asked.append(op)
            return list(values)

    monkeypatch.setattr(nccl, "_fallback", Kernels())
    nccl.all_reduce(parts(dtype), dv.ReduceOp.of(op))
    assert asked
    assert library.num_groups == 0


def test_the_laws_of_communicators_for_host_arrays():
    check_communicator(lambda size: Nccl(gpus(size), Library(), Arrays()), sizes=[1, 3])


@pytest.mark.parametrize("devices", [["cuda", 0, "cuda", 0], ["cpu", 0, "cpu", 1]])
def test_each_rank_needs_its_own_gpu(devices):
    pair = [dv.Device(devices[0], devices[1]), dv.Device(devices[2], devices[3])]
    with pytest.raises(AlgorithmError, match="GPU of its own"):
        Nccl(pair, Library(), Arrays())


@pytest.mark.skipif(not cuda.missing(), reason="there is a GPU")
def test_without_a_gpu_the_error_names_what_is_missing():
    with pytest.raises(AlgorithmError, match="GPU of its own"):
        dv.MirroredStrategy(["cpu:0", "cpu:1"], cross_device_ops="nccl")
    with pytest.raises(DeviceError, match="driver"):
        Nccl(gpus(2))
