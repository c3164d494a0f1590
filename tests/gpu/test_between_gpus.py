"""On several real GPUs: ``pytest -m multi_gpu``. No machine that has run it yet is known."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dvkernels.devices import cuda, driver
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels import cpu
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules import flag_all_reduce
from dvkernels.schedules.flag_selection import Route

COUNT = 0 if cuda.is_simulated() or cuda.missing() else len(cuda.devices())
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(COUNT < 2, reason=f"needs two GPUs; {COUNT} are there"),
]
LENGTHS = [1, 1000, 4099, 1 << 18, (1 << 20) + 3, (1 << 24) + 1]


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


@pytest.fixture
def between():
    """Return the module of the all-reduce between GPUs; reset its groups after the test."""
    from dvkernels.kernels.cuda.multi_gpu import all_reduce as between

    yield between
    between.recover()


def on_gpus(cupy, arrays):
    found = []
    for device, array in enumerate(arrays):
        with cupy.cuda.Device(device):
            found.append(cupy.asarray(array))
    return found


def some(length, dtype="f4", seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(length).astype(dtype) for _ in range(COUNT)]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("name", flag_all_reduce.PROTOCOLS)
def test_every_protocol_many_times(cupy, between, monkeypatch, name, waits):
    route = Route(flag_all_reduce.PROTOCOLS[name], tuple(range(COUNT)), waits)
    monkeypatch.setattr(between.flag_selection, "choose", lambda *_, **__: route)
    for turn, length in enumerate(LENGTHS * 20):
        arrays = [np.float32(np.arange(length) % 97 + turn + k) for k in range(COUNT)]
        buffers = on_gpus(cupy, arrays)
        results = between_all_reduce(buffers)
        right = np.sum(arrays, axis=0)
        assert all(np.array_equal(cupy.asnumpy(result), right) for result in results), length


def between_all_reduce(buffers, **how):
    from dvkernels.kernels import cuda as kernels

    return kernels.all_reduce(buffers, **how)


@pytest.mark.parametrize(("op", "dtype"), [("sum", "f4"), ("mean", "f2"), ("prod", "c8")])
def test_bits_are_those_of_the_cpu(cupy, op, dtype):
    arrays = some(10_007, dtype)
    results = between_all_reduce(on_gpus(cupy, arrays), op=op)
    right = cpu.reduce(arrays, op)
    assert {cupy.asnumpy(result).tobytes() for result in results} == {right.tobytes()}


def test_calls_back_to_back_while_one_gpu_is_slow(cupy):
    """Only streams order the calls: no buffer is read late or overwritten early."""
    length, turns = 20_000, 200
    buffers = on_gpus(cupy, [np.full(length, 1, "f8")] * COUNT)
    for turn in range(turns):
        with cupy.cuda.Device(turn % COUNT):
            slow = cupy.ones(1 << 22)
            for _ in range(turn % 7):
                slow *= 1.0001
        between_all_reduce(buffers, op="mean")
        for device, buffer in enumerate(buffers):
            with cupy.cuda.Device(device):
                buffer += 1
    assert all((cupy.asnumpy(buffer) == turns + 1).all() for buffer in buffers)


def test_a_missing_launch_times_out_and_the_group_recovers(cupy, between):
    from dvkernels.kernels.cuda.multi_gpu import group, peer_access

    found = driver.find()
    devices = tuple(range(COUNT))

    class DroppingRankOne(peer_access.PeerAccess):
        def launch(self, device, *rest):
            if device != 1:
                super().launch(device, *rest)

    buffers = on_gpus(cupy, some(5000))
    addresses = [buffer.data.ptr for buffer in buffers]
    peer_access.reach(found, devices)
    group_of_one_missing = group.DeviceGroup(devices, DroppingRankOne(found), timeout_seconds=0.5)
    dtype = np.dtype("f4")
    job = group.AllReduceCall(addresses, addresses, 5000, dtype, ReduceOp.SUM, [0] * COUNT)
    begun = time.monotonic()
    group_of_one_missing.all_reduce(job, Route(flag_all_reduce.two_shot, devices, True))
    for device in devices:
        found.synchronize(device)
    assert time.monotonic() - begun < 10
    with pytest.raises(CollectiveTimeoutError, match=r"rank 1 \(cuda:1\) did not come"):
        group_of_one_missing.check()
    group_of_one_missing.recover()
    group_of_one_missing.check()
