"""Public CUDA kernels over buffers on several simulated devices."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numba
import numpy as np
import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("runs in the CUDA simulator: NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from concurrency import concurrent
from numba import cuda
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from peers import bench, registry
from simulated_peers import SimulatedDriver

import dvkernels as dv
from dvkernels.benchmarks import between_gpus, gpu
from dvkernels.benchmarks.between_gpus import Library
from dvkernels.devices import cuda as cuda_devices
from dvkernels.devices import cuda_arrays, driver
from dvkernels.errors import BufferMismatchError, CollectiveTimeoutError, DeviceError
from dvkernels.kernels import cuda as kernels
from dvkernels.kernels.cuda.multi_gpu import all_reduce, peer_access
from dvkernels.schedules import flag_selection

pytestmark = pytest.mark.cuda


class Machine:
    """Driver double with several devices; ``place_on`` puts an array on one of them.

    The pairs in ``no_peer_access`` lack peer access.
    """

    def __init__(self, monkeypatch):
        self.captured = ()
        self.device_and_stream_of, self.no_peer_access, self.waited, self.kept = {}, set(), [], []
        self.is_open = lambda address: True
        self.peers = SimulatedDriver()
        self.streams = {}
        monkeypatch.setattr(all_reduce, "_groups", {})
        monkeypatch.setattr(driver, "find", lambda: self)
        monkeypatch.setattr(peer_access, "PeerAccess", lambda found: self.peers)
        self._place = cuda_arrays.locate
        monkeypatch.setattr(cuda_arrays, "locate", self.place)

    def open_peer(self, device, peer):
        return (device, peer) not in self.no_peer_access

    def wait(self, device, waiting, awaited):
        self.waited.append((device, waiting, awaited))

    def is_capturing(self, device, stream):
        return stream in self.captured

    def event(self, device):
        return []

    def record(self, lanes):
        for device, stream, event in lanes:
            event[:] = device, stream

    def wait_for(self, lanes):
        self.waited += [(device, stream, *event) for device, stream, event in lanes]

    def destroy(self, device, event):
        pass

    def synchronize(self, device):
        pass

    def place_on(self, array, device, stream=None):
        buffer = FakeCUDAArray(array)
        self.kept.append(buffer)
        self.device_and_stream_of[id(buffer)] = (device, stream)
        return buffer

    def allocate(self, monkeypatch, streams):
        """Let the array library allocate on these devices, with their current streams."""

        def empty(device, shape, dtype):
            return self.place_on(np.empty(shape, dtype), device, streams[device])

        monkeypatch.setattr(cuda_devices.arrays(), "empty", empty)

    def place(self, verb, buffers, name="replica"):
        found = self._place(verb, buffers, name)
        return [
            one._replace(device=device, stream=stream)
            for one, buffer in zip(found, buffers, strict=True)
            for device, stream in [self.device_and_stream_of.get(id(buffer), (0, 0))]
        ]


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def some(count, shape, dtype="f4"):
    rng = np.random.default_rng(count)
    return [rng.integers(-40, 40, shape).astype(dtype) for _ in range(count)]


@pytest.mark.parametrize("verb", ["direct_all_reduce", "ring_all_reduce"])
@pytest.mark.parametrize("no_peer_access", [(), ((0, 1), (2, 0))], ids=["peers", "strangers"])
def test_buffers_on_three_devices(machine, verb, no_peer_access):
    machine.no_peer_access = {*no_peer_access}
    arrays = some(3, (5, 40))
    right = np.sum(arrays, axis=0)
    with concurrent(seed=3):
        buffers = [
            machine.place_on(array, rank, cuda.stream()) for rank, array in enumerate(arrays)
        ]
        results = getattr(kernels, verb)(buffers)
    assert all(one is other for one, other in zip(results, buffers, strict=True))
    assert all(np.array_equal(array, right) for array in arrays)
    waits = machine.peers.events == 3  # one per rank, for its next call
    assert waits == (not no_peer_access)


@pytest.mark.parametrize(
    ("algorithm", "dtype", "protocol"),
    [
        ("auto", "f4", "ring"),
        ("auto", "f2", "staged"),
        ("ring", "f4", "ring"),
        ("direct", "f4", "staged"),
    ],
)
def test_only_neighbours_have_peer_access(machine, monkeypatch, algorithm, dtype, protocol):
    routes, choose = [], flag_selection.choose

    def choosing(*args, **named):
        routes.append(choose(*args, **named))
        return routes[-1]

    monkeypatch.setattr(flag_selection, "choose", choosing)
    machine.no_peer_access = {(0, 1), (1, 2), (2, 0)}
    arrays = some(3, 50, dtype)
    right = np.sum(arrays, axis=0)
    with concurrent(seed=1):
        buffers = [machine.place_on(array, k, cuda.stream()) for k, array in enumerate(arrays)]
        kernels.all_reduce(buffers, algorithm=algorithm)
    assert all(np.array_equal(array, right) for array in arrays)
    assert [route.make.__name__ for route in routes] == [protocol]


@pytest.mark.parametrize(("algorithm", "dtype"), [("direct", "i4"), ("ring", "u1"), ("auto", "?")])
def test_a_custom_reduction(machine, algorithm, dtype):
    op = dv.CustomReduction(numba.njit(lambda a, b: a ^ b), 0, "xor")
    arrays = some(3, 200, dtype)
    right = np.bitwise_xor.reduce(arrays)
    with concurrent(seed=2):
        buffers = [machine.place_on(array, k, cuda.stream()) for k, array in enumerate(arrays)]
        kernels.all_reduce(buffers, op, algorithm=algorithm)
    assert all(np.array_equal(array, right) for array in arrays)


def test_out_has_streams_of_its_own(machine):
    arrays = some(2, 77, "f8")
    before = [array.copy() for array in arrays]
    outs = [np.zeros(77) for _ in arrays]
    with concurrent():
        streams = [cuda.stream() for _ in range(4)]
        buffers = [machine.place_on(array, k, streams[k]) for k, array in enumerate(arrays)]
        places = [machine.place_on(out, k, streams[2 + k]) for k, out in enumerate(outs)]
        kernels.all_reduce(buffers, "mean", out=places)
    assert all(np.array_equal(out, np.mean(before, axis=0)) for out in outs)
    assert all(np.array_equal(now, then) for now, then in zip(arrays, before, strict=True))
    to_and_fro = [(k, streams[k], streams[2 + k]) for k in range(2)]
    assert machine.waited == [*to_and_fro, *((k, b, a) for k, a, b in to_and_fro)]


@pytest.mark.parametrize("dtype", ["i2", "f2", "c8"])
def test_buffers_that_are_not_dense_and_two_on_one_device(machine, dtype):
    rooms = [np.zeros((12, 2), dtype) for _ in range(3)]
    arrays = [room[::2, 1] for room in rooms]
    for array, values in zip(arrays, some(3, 6, dtype), strict=True):
        array[:] = values
    right = np.sum(arrays, axis=0).astype(dtype)
    buffers = [
        machine.place_on(array, device, 0) for array, device in zip(arrays, (0, 1, 0), strict=True)
    ]
    kernels.all_reduce(buffers)
    assert all(np.array_equal(array, right) for array in arrays)
    assert all(not room[:, 0].any() and not room[1::2].any() for room in rooms)


def test_other_verbs_run_on_the_first_device_and_streams_wait_both_ways(machine):
    arrays = some(3, 12)
    buffers = [machine.place_on(array, rank, 10 + rank) for rank, array in enumerate(arrays)]
    out = np.zeros(12, "f4")
    kernels.reduce(buffers, "max", out=machine.place_on(out, 0, 10))
    assert np.array_equal(out, np.max(arrays, axis=0))
    before = [(0, 10, rank, 10 + rank) for rank in (1, 2)]
    assert machine.waited == [
        *before,
        *((*there, *home) for *home, a, b in before for there in [(a, b)]),
    ]
    outs = [np.zeros(36, "f4") for _ in arrays]
    kernels.all_gather(
        buffers, out=[machine.place_on(one, k, 10 + k) for k, one in enumerate(outs)]
    )
    assert all(np.array_equal(one, np.concatenate(arrays)) for one in outs)
    kernels.broadcast(buffers, root=2)
    assert all(np.array_equal(array, arrays[2]) for array in arrays)
    kernels.all_reduce_many([buffers])
    assert all(np.array_equal(array, 3 * outs[0][24:]) for array in arrays)


def test_a_captured_graph_has_all_streams_and_neither_flags_nor_slots(machine):
    arrays = some(3, 12)
    right = np.sum(arrays, axis=0)
    machine.captured = (11,)
    kernels.all_reduce(
        [machine.place_on(array, rank, 10 + rank) for rank, array in enumerate(arrays)]
    )
    assert all(np.array_equal(array, right) for array in arrays)
    assert machine.peers.events > 3  # by launches
    assert machine.waited == [(k, 10 + k, 1, 11) for k in (0, 2)] + [
        (1, 11, k, 10 + k) for k in (0, 2)
    ]
    machine.no_peer_access = {(0, 1), (0, 2)}  # no ring either
    all_reduce._groups.clear()
    with pytest.raises(DeviceError, match="CUDA graph"):
        kernels.all_reduce([machine.place_on(a, rank, 10 + rank) for rank, a in enumerate(arrays)])


def test_a_failed_group_fails_until_recover(machine):
    arrays = some(2, 30)
    right = np.sum(arrays, axis=0)
    machine.peers = SimulatedDriver(absent=[1])
    with concurrent():
        buffers = [machine.place_on(array, k, cuda.stream()) for k, array in enumerate(arrays)]
        kernels.all_reduce(buffers)
        kernels.abort()
    with pytest.raises(CollectiveTimeoutError, match="was aborted"):
        kernels.all_reduce(buffers)
    machine.peers._absent = ()
    kernels.recover()
    for array, fresh in zip(arrays, some(2, 30), strict=True):
        array[:] = fresh
    with concurrent():
        kernels.all_reduce([machine.place_on(a, k, cuda.stream()) for k, a in enumerate(arrays)])
    assert all(np.array_equal(array, right) for array in arrays)


def test_a_failed_launch_aborts_the_earlier_ones(machine):
    arrays = some(2, 30)
    launch = machine.peers.launch

    def failing(device, *rest):
        if device == 1:
            raise DeviceError("cuLaunchKernel failed")
        launch(device, *rest)

    machine.peers.launch = failing
    with concurrent(), pytest.raises(DeviceError, match="cuLaunchKernel"):
        kernels.all_reduce([machine.place_on(a, k, cuda.stream()) for k, a in enumerate(arrays)])
    with pytest.raises(CollectiveTimeoutError):
        kernels.all_reduce([machine.place_on(a, k, 0) for k, a in enumerate(arrays)])


def test_memory_of_a_closed_pool_is_not_accessed_by_peers(machine):
    arrays = some(2, 5000)
    right = np.sum(arrays, axis=0)
    machine.is_open = lambda address: False
    with concurrent():
        kernels.all_reduce([machine.place_on(a, k, cuda.stream()) for k, a in enumerate(arrays)])
    assert all(np.array_equal(array, right) for array in arrays)


def test_new_results_lie_on_the_gpus_of_their_buffers(machine):
    arrays = some(2, 10)
    buffers = [machine.place_on(array, 0, 0) for array in arrays]
    machine.device_and_stream_of[id(buffers[1])] = (1, 0)
    made = []
    empty = SimpleNamespace(
        empty=lambda device, *_: made.append(device) or FakeCUDAArray(np.zeros(10, "f4"))
    )
    machine.no_peer_access = {(0, 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvkernels.devices.cuda.arrays", lambda: empty)
        results = kernels.all_reduce_unchecked(buffers, dv.ReduceOp.SUM, "auto")
    assert made == [0, 1]
    assert all(np.array_equal(result._ary, sum(arrays)) for result in results)


def test_bad_input_touches_nothing(machine):
    arrays = some(2, 10)
    before = [array.copy() for array in arrays]
    buffers = [machine.place_on(array, k, 0) for k, array in enumerate(arrays)]
    outs = [machine.place_on(np.zeros(10, "f4"), 0, 0) for _ in range(2)]
    with pytest.raises(DeviceError, match="replica 1 is on cuda:1, out 1 on cuda:0"):
        kernels.all_reduce(buffers, out=outs)
    with pytest.raises(BufferMismatchError, match="replica 1 holds"):
        kernels.all_reduce([buffers[0], machine.place_on(np.zeros(9, "f4"), 1, 0)])
    machine.no_peer_access = {(0, 1)}
    with pytest.raises(
        DeviceError, match="cuda:0 does all the work, and has no peer access to cuda:1"
    ):
        kernels.reduce(buffers)
    machine.no_peer_access, machine.is_open = set(), lambda address: False
    with pytest.raises(DeviceError, match="pool"):
        kernels.broadcast(buffers)
    assert all(np.array_equal(now, then) for now, then in zip(arrays, before, strict=True))
    assert not machine.peers.launched


def test_the_measurement_covers_every_protocol_and_contestant(machine, monkeypatch):
    calls_taken = []

    def contestant(bench, inputs, outs):
        def call():
            calls_taken.append(len(inputs))
            for out in outs:
                out._ary[:] = sum(one._ary for one in inputs)

        return lambda calls: bench.seconds(call, calls)

    plan = gpu.MeasurementPlan(
        between_nbytes=(256, 4096), rounds=2, calls=2, small_calls=3, small_nbytes=256
    )
    with concurrent():
        streams = [cuda.stream() for _ in range(3)]
        monkeypatch.setattr(machine, "synchronize", lambda device: streams[device].synchronize())
        machine.allocate(monkeypatch, streams)
        figures = between_gpus.measure([0, 1, 2], plan, {"rival": Library(lambda *_: contestant)})
        machine.no_peer_access = {(0, 1), (0, 2)}
        all_reduce._groups.clear()
        alone = between_gpus.measure([0, 1, 2], plan, {})
    assert [(one.nbytes, one.replicas) for one in figures] == [(256, 3), (4096, 3)]
    contestants = {"one_shot", "two_shot", "ring", "staged", "rival", "copy"}
    assert all(one.neighbours.keys() == contestants for one in figures)
    assert all(one.seconds > 0 and one.attained > 0 for one in figures)
    assert {*calls_taken} == {3}
    assert all(one.neighbours.keys() == {"staged", "copy"} for one in alone)


def test_a_contestant_with_wrong_results_is_not_reported(machine, monkeypatch):
    machine.no_peer_access = {(0, 1)}
    plan = gpu.MeasurementPlan(between_nbytes=(256,), rounds=1, calls=1, small_calls=1)
    machine.allocate(monkeypatch, [0, 0])
    idle = {"idle": Library(lambda *_: lambda *_: lambda calls: 1.0)}
    with pytest.raises(DeviceError, match=r"GPUs, idle: .*nothing is reported"):
        between_gpus.measure([0, 1], plan, idle)


def test_absent_libraries_are_reported(machine, monkeypatch):
    machine.no_peer_access = {(0, 1)}
    plan = gpu.MeasurementPlan(between_nbytes=(256,), rounds=1, calls=1, small_calls=1)
    machine.allocate(monkeypatch, [0, 0])
    monkeypatch.setattr(registry, "version_of", lambda peer, python: None)
    libraries = {**between_gpus.LIBRARIES, **bench.LIBRARIES_BETWEEN_GPUS}
    notes = {one.name: one.note for one in between_gpus.measure([0, 1], plan, libraries)[1:]}
    assert "the simulator has none" in notes["all_reduce between GPUs, nccl"]
    assert "torch is not installed" in notes["all_reduce between GPUs, torch nccl"]
    (one,) = between_gpus.measure([0], plan, {})
    assert one.note == "not measured: it takes two GPUs, and there is 1"
