"""Direct collectives between GPUs by CUDA-aware MPI: the laws, and the order of streams and MPI."""

from __future__ import annotations

import functools
import itertools
import time

import ml_dtypes
import numba
import numpy as np
import pytest
from gpu_double import Arrays, Mpi, OfHost, OnDevice
from threads_as_workers import Together, at_once, results, transports

from dvkernels.communicators.workers.gpu import collectives
from dvkernels.communicators.workers.gpu.collectives import GpuCollectives
from dvkernels.communicators.workers.gpu.direct import GpuDirect
from dvkernels.communicators.workers.gpu.staged import Staged
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.custom_reduction import CustomReduction
from dvkernels.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    DeviceError,
    WorkerLostError,
)
from dvkernels.kernels import cpu
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules import cost_model
from dvkernels.testing import check_communicator

SUM = ReduceOp.SUM
ALGORITHMS = pytest.mark.parametrize("algorithm", ["all-gather", "reduce-scatter"])


def choose(monkeypatch, algorithm, piece_nbytes=2048):
    """Select one algorithm for all arrays, in small pieces."""
    seconds = -np.inf if algorithm == "reduce-scatter" else np.inf
    monkeypatch.setattr(
        cost_model, "NETWORK", cost_model.NETWORK._replace(exchange_seconds=seconds)
    )
    monkeypatch.setattr(collectives, "PIECE_NBYTES", piece_nbytes)


def group(size, seed=0, timeout_seconds=20.0):
    """Return workers on threads, and the GPU double of each."""
    comms = Mpi(size, seed).comms
    arrays = [Arrays(seed + 100 * rank) for rank in range(size)]
    workers = []
    for wire, comm, seam in zip(transports(size, timeout_seconds), comms, arrays, strict=True):
        plain = WorkerGroup(wire, [comm])
        workers.append(Staged(plain, seam, GpuDirect(plain, seam, seam.reduce)))
    return workers, arrays


def outcomes(workers, verb, values, *args, of=at_once):
    """Return the result of a verb on each worker; an argument that is a list has one per worker."""
    calls = []
    for k, worker in enumerate(workers):
        own = [arg[k] if isinstance(arg, list) else arg for arg in args]
        calls.append(functools.partial(getattr(worker, verb), [values[k]], *own))
    return of(*calls)


def every(workers, verb, values, *args, arrays=()):
    """Return the array of each worker once its GPU has completed it."""
    found = outcomes(workers, verb, values, *args, of=results)
    for seam in arrays:
        seam.drain()
    return [one[0] for one in found]


def on_device(content):
    return OnDevice(np.array(content))


def ones(length, count=2):
    return [on_device(np.ones(length)) for _ in range(count)]


@ALGORITHMS
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_laws_of_communicators(size, algorithm, monkeypatch):
    choose(monkeypatch, algorithm, 512)
    comms, seams = Mpi(size).comms, [Arrays(rank) for rank in range(size)]

    def over(worker, rest):
        worker.gpu_comms, seam = [comms[worker.rank]], seams[worker.rank]
        direct = GpuDirect(worker, seam, seam.reduce)
        return OfHost(Staged(worker, seam, direct), seam)

    check_communicator(lambda size: Together(size, over=over), sizes=[size])
    assert all(seam.num_pinned <= 8 for seam in seams), "custom reductions are staged"


LENGTHS = [0, 1, 2, 63, 64, 65, 500, 511, 512, 513, 1024, 1025, 4000]


@ALGORITHMS
@pytest.mark.parametrize("dtype", ["f4", "f2", ml_dtypes.bfloat16, "f8", "i2", "c8"])
def test_bits_are_those_of_the_kernels(algorithm, dtype, monkeypatch):
    choose(monkeypatch, algorithm)
    for seed, length in enumerate(LENGTHS):
        workers, arrays = group(3, seed)
        values = [np.random.default_rng([seed, k]).integers(1, 9, length) / 3 for k in range(3)]
        values = [value.astype(dtype) for value in values]
        if values[0].dtype.kind == "f" and length > 1:
            values[1][1] = np.nan
        ops = [SUM, ReduceOp.PROD]
        ops += [] if dtype == "c8" else [ReduceOp.MIN]
        ops += [] if dtype == "i2" else [ReduceOp.MEAN]
        for op in ops:
            found = every(workers, "all_reduce", [*map(on_device, values)], op, arrays=arrays)
            right = cpu.reduce(values, op).tobytes()
            assert [one.hidden.tobytes() for one in found] == [right] * 3, (op, length)
        assert not any(seam.num_pinned for seam in arrays)


@ALGORITHMS
@pytest.mark.parametrize("seed", range(8))
def test_later_work_does_not_disturb_a_pending_call(algorithm, seed, monkeypatch):
    """Streams change between calls, values are overwritten afterwards, and memory is reused."""
    choose(monkeypatch, algorithm)
    workers, arrays = group(2, seed)
    sizes = [5, 3000, 700, 5, 9, 3001]

    def call(worker):
        seam = arrays[worker.rank]
        found = []
        for turn, size in enumerate(sizes):
            seam.stream = seam.streams[turn % 2]
            value = seam.empty(0, (size,), np.dtype("f4"))
            seam.copy(value, np.full(size, turn + worker.rank, "f4"))  # pending during the call
            out = [value] if turn % 3 == 0 else None
            result = worker.all_reduce([value], SUM, out)[0]
            assert (result is value) == (turn % 3 == 0)
            if out is None:
                seam.copy(value, np.full(size, -99, "f4"))
            found.append(result)
        seam.drain()
        return [one.hidden for one in found]

    for found in results(*(functools.partial(call, worker) for worker in workers)):
        for turn, (one, size) in enumerate(zip(found, sizes, strict=True)):
            np.testing.assert_array_equal(one, np.full(size, 2 * turn + 1, "f4"))
    assert not any(seam.num_pinned for seam in arrays)


def test_scratch_is_kept(monkeypatch):
    for algorithm in ("all-gather", "reduce-scatter"):
        choose(monkeypatch, algorithm)
        workers, arrays = group(2)
        for _ in range(4):
            every(workers, "all_reduce", ones(3000), SUM)
        # one result per call, and once the scratch: empty at first, and then
        assert [seam.num_made for seam in arrays] == [4 + 2] * 2


@ALGORITHMS
def test_arrays_of_any_layout(algorithm, monkeypatch):
    choose(monkeypatch, algorithm)
    workers, arrays = group(2)
    base = np.arange(4 * 6 * 10.0).reshape(4, 6, 10)
    values = [OnDevice(base.transpose(2, 0, 1)[::2] + 0), OnDevice(base.transpose(2, 0, 1)[::2])]
    out = OnDevice(np.zeros((4, 6, 5)).transpose(2, 0, 1))
    found = every(workers, "all_reduce", values, SUM, [[out], None], arrays=arrays)
    assert found[0] is out
    for one in found:
        np.testing.assert_array_equal(one.hidden, 2 * values[1].hidden)
    for axis, counts in itertools.product(range(3), [(2, 1), (0, 3), (0, 0)]):
        rows = np.moveaxis(base, 0, axis)
        parts = [rows.take(range(count), axis) + k for k, count in enumerate(counts)]
        found = every(workers, "all_gather", [*map(OnDevice, parts)], axis, arrays=arrays)
        for one in found:
            assert one.flags.c_contiguous
            np.testing.assert_array_equal(one.hidden, np.concatenate(parts, axis))
    for root in range(2):
        for one in every(workers, "broadcast", values, root, arrays=arrays):
            np.testing.assert_array_equal(one.hidden, values[root].hidden)
    assert not any(seam.num_pinned for seam in arrays)


@pytest.mark.parametrize("where", list(itertools.product([True, False], repeat=3)))
def test_one_value_in_host_memory_stages_all_values(where):
    workers, arrays = group(3)
    put = lambda array, rank: OnDevice(array) if where[rank] else array  # noqa: E731

    def call(worker):
        rank = worker.rank
        found = [
            worker.all_reduce([put(np.full(5, rank + 1.0), rank)], ReduceOp.MEAN)[0],
            worker.reduce_scatter([put(np.full(5, rank + 1), rank)], SUM)[0],
            worker.all_gather([put(np.full((rank, 2), rank), rank)], 0)[0],
            worker.broadcast([put(np.full(3, rank), rank)], 1)[0],
        ]
        arrays[rank].drain()
        assert all(isinstance(one, OnDevice) == where[rank] for one in found)
        return [getattr(one, "hidden", one).tolist() for one in found]

    calls = (functools.partial(call, worker) for worker in workers)
    for rank, found in enumerate(results(*calls)):
        rows = [[1, 1], [2, 2], [2, 2]]
        assert found == [[2.0] * 5, [6] * (2, 2, 1)[rank], rows, [1] * 3]
    pinned = [seam.num_pinned > 0 for seam in arrays]
    assert pinned == [lies and not all(where) for lies in where]


def test_a_custom_reduction_is_staged():
    workers, arrays = group(2)
    op = CustomReduction(numba.njit(lambda a, b: a + b), 0, "my sum")
    for one in every(workers, "all_reduce", ones(3), op, arrays=arrays):
        assert one.hidden.tolist() == [2.0] * 3
    assert [seam.num_pinned for seam in arrays] == [1, 1]


def test_another_thread_has_its_own_memory(monkeypatch):
    choose(monkeypatch, "reduce-scatter")
    mpis = [Mpi(2), Mpi(2, 1)]
    seams = [Arrays(0), Arrays(1)]
    workers = []
    for rank, wire in enumerate(transports(2)):
        plain = WorkerGroup(wire, [mpi.comms[rank] for mpi in mpis])
        workers.append(
            Staged(plain, seams[rank], GpuDirect(plain, seams[rank], seams[rank].reduce))
        )
    beside = [worker.duplicate() for worker in workers]
    for group_of_thread, mpi in ((beside, mpis[1]), (workers, mpis[0])):
        assert not mpi.receives
        every(group_of_thread, "all_reduce", ones(900), SUM)
        assert mpi.receives


# -- failures --------------------------------------------------------------------------------------


def test_workers_that_disagree_move_nothing():
    workers, arrays = group(2)
    values = [on_device(np.ones(3)), on_device(np.ones(4))]
    for error in outcomes(workers, "all_reduce", values, SUM):
        assert isinstance(error, CollectiveMismatchError)
        assert "worker 0 called gpu.all_reduce(sum, float64[3])" in str(error)
    found = every(workers, "broadcast", values[:1] * 2, 0, arrays=arrays)
    assert [one.hidden.tolist() for one in found] == [[1.0] * 3] * 2


@pytest.mark.parametrize("verb", ["all_reduce", "all_gather", "broadcast"])
def test_out_of_memory_on_one_worker_moves_nothing_on_all(verb):
    workers, arrays = group(2)
    argument = SUM if verb == "all_reduce" else 0

    def full(*_):
        raise DeviceError("no room")

    def fails():
        arrays[0].empty = full
        with pytest.raises(DeviceError, match="no room") as caught:
            getattr(workers[0], verb)([on_device(np.ones(3))], argument)
        workers[0].announce(caught.value)

    _, error = at_once(fails, lambda: getattr(workers[1], verb)([on_device(np.ones(3))], argument))
    assert isinstance(error, CollectiveMismatchError)
    assert "DeviceError: no room" in str(error)


@ALGORITHMS
def test_a_gpu_that_is_stuck_before_the_call_is_an_error(algorithm, monkeypatch):
    choose(monkeypatch, algorithm)
    workers, arrays = group(2, timeout_seconds=1.0)
    arrays[0].stream.is_stuck = True
    errors = outcomes(workers, "all_reduce", ones(900), SUM)
    assert all(isinstance(error, CollectiveTimeoutError) for error in errors)
    assert "worker 0 waited 1 s in vain for its cuda:0" in str(errors[0])
    assert "in vain for workers [0]" in str(errors[1])


def test_a_gpu_that_is_stuck_half_way_aborts_the_group(monkeypatch):
    choose(monkeypatch, "reduce-scatter")
    workers, arrays = group(2, timeout_seconds=1.0)

    def stuck(*args, **named):
        arrays[0].stream.is_stuck = True

    workers[0]._direct._reduce = stuck
    before = len(collectives._abandoned)
    errors = outcomes(workers, "all_reduce", ones(900), SUM)
    assert isinstance(errors[0], CollectiveTimeoutError)
    assert isinstance(errors[1], (WorkerLostError, CollectiveTimeoutError))
    assert all(worker.has_ended for worker in workers)
    kept = [of_worker for of_worker, _ in collectives._abandoned[before:]]
    assert len(kept) == 2
    assert all(isinstance(one, GpuCollectives) for one in kept), (
        "a late message still finds its memory"
    )


@ALGORITHMS
def test_a_worker_that_moves_nothing_is_a_timeout(algorithm, monkeypatch):
    choose(monkeypatch, algorithm)
    workers, _ = group(2, timeout_seconds=1.0)
    monkeypatch.setattr(GpuDirect, "_collectives_on", silent(GpuDirect._collectives_on, rank=1))
    errors = outcomes(workers, "all_reduce", ones(900), SUM)
    assert isinstance(errors[0], CollectiveTimeoutError)
    assert "worker 0 waited 1 s in vain for workers [1] to move their data" in str(errors[0])
    with pytest.raises(CollectiveTimeoutError):
        workers[1].barrier()


def silent(of, rank):
    class Silent:
        def prepare_all_reduce(self, source):
            pass

        def all_reduce(self, *_):
            pass

    return lambda self, device: Silent() if self._workers.rank == rank else of(self, device)


def test_a_failure_of_mpi_or_of_the_gpu_is_raised_on_all(monkeypatch):
    choose(monkeypatch, "reduce-scatter")
    workers, _ = group(2, timeout_seconds=20.0)

    def fails(*_, **__):
        raise RuntimeError("an illegal address")

    workers[0]._direct._reduce = fails
    began = time.monotonic()
    for error in outcomes(workers, "all_reduce", ones(900), SUM):
        assert isinstance(error, WorkerLostError)
        assert "worker 0 failed in gpu.all_reduce(sum, float64[900]): an illegal" in str(error)
    assert time.monotonic() - began < 10, "long before the deadline"
