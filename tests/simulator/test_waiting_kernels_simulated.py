"""Flag kernels in the concurrent simulator, where all blocks of all ranks run at the same time."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("runs in the CUDA simulator: NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

import ml_dtypes
from concurrency import concurrent
from numba import cuda
from simulated_peers import SimulatedDriver

from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels import cpu
from dvkernels.kernels.cuda.multi_gpu import group as group_module
from dvkernels.kernels.cuda.multi_gpu.group import AllReduceCall, DeviceGroup
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules import flag_all_reduce
from dvkernels.schedules.flag_selection import Route

pytestmark = pytest.mark.cuda
PROTOCOLS = flag_all_reduce.PROTOCOLS


def job(inputs, outputs, op, streams):
    first = inputs[0]
    addresses = [[array.ctypes.data for array in arrays] for arrays in (inputs, outputs)]
    return AllReduceCall(*addresses, first.size, first.dtype, ReduceOp(op), streams)


def some(num_ranks, length, dtype="f4", seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(-40, 40, length).astype(dtype) for _ in range(num_ranks)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let a few hundred elements make several blocks, and several calls of a slot's size."""
    monkeypatch.setattr(group_module, "_BLOCK_NBYTES", 256)
    monkeypatch.setattr(group_module, "MOST_BLOCKS", 4)
    monkeypatch.setattr(group_module, "_SLOT_NBYTES", 1024)


@pytest.mark.parametrize("waits", [True, False], ids=["waiting", "by launches"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_consecutive_calls_give_the_sums(name, num_ranks, waits):
    route = Route(PROTOCOLS[name], tuple(range(num_ranks)), waits)
    lengths = (1200, 0, 5, 701, 300, 301)
    calls = [some(num_ranks, length, seed=seed) for seed, length in enumerate(lengths)]
    expected = [np.sum(call, axis=0) for call in calls]
    driver = SimulatedDriver()
    with concurrent(seed=num_ranks):
        group = DeviceGroup(range(num_ranks), driver, timeout_seconds=5)
        streams = [cuda.stream() for _ in range(num_ranks)]
        for call in calls:
            group.all_reduce(job(call, call, "sum", streams), route)
    group.check()
    for call, right in zip(calls, expected, strict=True):
        assert all(np.array_equal(array, right) for array in call)
    assert driver.events == num_ranks or not waits


@pytest.mark.parametrize("seed", range(4))
def test_protocols_mix_and_streams_change(seed):
    rng = np.random.default_rng(seed)
    names, num_ranks = [*PROTOCOLS], 3
    calls = [some(num_ranks, int(rng.integers(0, 900)), seed=k) for k in range(8)]
    before = [[array.copy() for array in call] for call in calls]
    outs = [[np.empty_like(array) for array in call] for call in calls]
    with concurrent(seed=seed):
        group = DeviceGroup(range(num_ranks), SimulatedDriver(), timeout_seconds=5)
        streams = [[cuda.stream() for _ in range(num_ranks)] for _ in range(2)]
        for number, (call, out) in enumerate(zip(calls, outs, strict=True)):
            order = tuple(int(rank) for rank in rng.permutation(num_ranks))
            route = Route(PROTOCOLS[names[rng.integers(5)]], order, bool(rng.integers(3)))
            group.all_reduce(job(call, out, "sum", streams[number % 3 == 0]), route)
    for call, kept, out in zip(calls, before, outs, strict=True):
        assert all(np.array_equal(now, then) for now, then in zip(call, kept, strict=True))
        assert all(np.array_equal(array, np.sum(kept, axis=0)) for array in out)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        ("mean", "f4"),
        ("mean", ml_dtypes.bfloat16),
        ("sum", "f2"),
        ("sum", "c8"),
        ("prod", "c8"),
        ("max", "f8"),
        ("sum", "u1"),
    ],
)
@pytest.mark.parametrize("name", ["one_shot", "two_shot", "chain", "staged"])
def test_bits_are_those_of_the_cpu(name, op, dtype):
    num_ranks = 3
    rng = np.random.default_rng(7)
    buffers = [(rng.standard_normal(333) * 9).astype(dtype) for _ in range(num_ranks)]
    if op == "max":
        buffers[1][5] = np.nan
    expected = cpu.reduce(buffers, op)
    route = Route(PROTOCOLS[name], tuple(range(num_ranks)), waits=True)
    with concurrent():
        streams = [cuda.stream() for _ in range(num_ranks)]
        group = DeviceGroup(range(num_ranks), SimulatedDriver(), timeout_seconds=5)
        group.all_reduce(job(buffers, buffers, op, streams), route)
    group.check()
    assert len({array.tobytes() for array in buffers}) == 1
    if name != "chain":  # its additions begin at another rank for each part
        assert buffers[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("offsets", [(0, 0), (4, 4), (8, 4), (12, 0)])
def test_any_alignment_and_no_write_outside(offsets):
    rooms = [np.full(120, 7, "f4") for _ in offsets]
    starts = [
        (-room.ctypes.data % 16 + 16 + offset) // 4
        for room, offset in zip(rooms, offsets, strict=True)
    ]
    buffers = [room[start : start + 75] for room, start in zip(rooms, starts, strict=True)]
    for rank, buffer in enumerate(buffers):
        buffer[:] = rank + 1
    with concurrent():
        group = DeviceGroup((0, 1), SimulatedDriver(), timeout_seconds=5)
        streams = [cuda.stream() for _ in offsets]
        for name in ("two_shot", "one_shot", "ring"):
            route = Route(PROTOCOLS[name], (0, 1), waits=True)
            group.all_reduce(job(buffers, buffers, "max", streams), route)
    for room, start in zip(rooms, starts, strict=True):
        inside = slice(start, start + 75)
        assert (room[inside] == 2).all()
        assert (np.delete(room, np.r_[inside]) == 7).all()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_rank_that_never_comes_is_named_and_all_others_leave(name):
    buffers = some(3, 200)
    driver = SimulatedDriver(absent=[1])
    route = Route(PROTOCOLS[name], (0, 1, 2), waits=True)
    begun = time.monotonic()
    with concurrent():
        group = DeviceGroup((0, 1, 2), driver, timeout_seconds=1.0)
        streams = [cuda.stream() for _ in range(3)]
        group.all_reduce(job(buffers, buffers, "sum", streams), route)
    assert time.monotonic() - begun < 20
    with pytest.raises(
        CollectiveTimeoutError, match=r"rank 1 \(cuda:1\) did not come within 1.0 s"
    ):
        group.check()
    num_launched = len(driver.launched)
    with pytest.raises(CollectiveTimeoutError):
        group.all_reduce(job(buffers, buffers, "sum", streams), route)
    assert len(driver.launched) == num_launched
    # All that failed is forgotten, whatever the flags hold by now.
    driver._absent = ()
    group.recover()
    buffers = some(3, 200)
    right = np.sum(buffers, axis=0)
    with concurrent(seed=1):
        group.all_reduce(job(buffers, buffers, "sum", streams), route)
    group.check()
    assert all(np.array_equal(array, right) for array in buffers)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_abort_ends_all_waiting_long_before_the_deadline(name):
    buffers = some(2, 200)
    route = Route(PROTOCOLS[name], (0, 1), waits=True)
    begun = time.monotonic()
    with concurrent():
        group = DeviceGroup((0, 1), SimulatedDriver(absent=[0]), timeout_seconds=1000)
        streams = [cuda.stream() for _ in range(2)]
        for _ in range(3):
            group.all_reduce(job(buffers, buffers, "sum", streams), route)
        time.sleep(0.1)
        group.abort()
    assert time.monotonic() - begun < 20
    with pytest.raises(CollectiveTimeoutError, match="was aborted"):
        group.check()


def test_kernels_are_loaded_on_all_devices_before_the_first_launch():
    driver = SimulatedDriver()
    buffers = some(3, 50)
    launched_at_load = []
    load = driver.load
    driver.load = lambda *args: (launched_at_load.append(len(driver.launched)), load(*args))[1]
    with concurrent():
        group = DeviceGroup((0, 1, 2), driver)
        streams = [cuda.stream() for _ in range(3)]
        route = Route(PROTOCOLS["ring"], (0, 1, 2), waits=True)
        group.all_reduce(job(buffers, buffers, "sum", streams), route)
    assert launched_at_load == [0, 0, 0]
    assert driver.launched == [0, 1, 2]


def test_a_launch_has_no_more_blocks_than_run_at_once():
    """A block that waits for one that cannot begin would wait for its deadline."""
    driver = SimulatedDriver(num_resident=2)
    buffers = some(2, 1000)
    expected = buffers[0] + buffers[1]
    with concurrent():
        group = DeviceGroup((0, 1), driver)
        streams = [cuda.stream() for _ in range(2)]
        route = Route(PROTOCOLS["two_shot"], (0, 1), waits=True)
        group.all_reduce(job(buffers, buffers, "sum", streams), route)
    assert driver.num_blocks == {2}
    np.testing.assert_array_equal(buffers, [expected] * 2)
