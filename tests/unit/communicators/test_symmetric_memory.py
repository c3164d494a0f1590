"""Symmetric memory: arrays are reduced in place, and no others are written."""

from __future__ import annotations

import functools
import random
from itertools import chain

import ml_dtypes
import numba
import numpy as np
import pytest
from threads_as_workers import ThreadSegmentAllocator, at_once, results, transports

from dvkernels import kernels
from dvkernels.communicators.hierarchical import Hierarchical
from dvkernels.communicators.local import Local
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.communicators.workers.shm import transport as shm_transport
from dvkernels.communicators.workers.shm.symmetric_memory import SymmetricMemory
from dvkernels.custom_reduction import CustomReduction
from dvkernels.errors import CollectiveMismatchError, DeviceError, WorkerLostError
from dvkernels.reduce_op import ReduceOp

FIRST_DIGITS = CustomReduction(numba.njit(lambda a, b: a * 10 + b), 0, "digits")


@pytest.fixture
def staged(monkeypatch):
    """Return the list of the columns that were not reduced in place."""
    found = []
    original = shm_transport.shm_all_reduce.SharedMemoryAllReduce.lay_out

    def lay_out(self, columns, num_sources, op):
        found.extend(columns)
        return original(self, columns, num_sources, op)

    monkeypatch.setattr(shm_transport.shm_all_reduce.SharedMemoryAllReduce, "lay_out", lay_out)
    return found


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Reduce short arrays in place too, so that tests cover their ends."""
    monkeypatch.setattr(shm_transport, "_MIN_IN_PLACE_NBYTES", 1)
    all_reduce = shm_transport.shm_all_reduce
    declined = all_reduce.DECLINED
    monkeypatch.setattr(all_reduce.SharedMemoryAllReduce, "run_short", lambda *_: declined)


def groups(size, **given):
    return [WorkerGroup(transport) for transport in transports(size, **given)]


def empties(workers, shape, dtype=np.float64, counts=None):
    shape = shape if isinstance(shape, tuple) else (shape,)
    counts = counts or [1] * len(workers)
    calls = [
        functools.partial(worker.empty, shape, np.dtype(dtype), count)
        for worker, count in zip(workers, counts, strict=True)
    ]
    return results(*calls)


def joined(lists):
    return [*chain.from_iterable(lists)]


def over(workers, num_local):
    counts = [num_local] * len(workers)
    inside = Local(num_local, "auto")
    return [Hierarchical(inside, worker, counts) for worker in workers]


def drawn(rng, shape, dtype):
    return (rng.standard_normal(shape) * 8).astype(dtype)


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("num_local", [1, 2])
@pytest.mark.parametrize(
    "dtype", [np.float32, np.complex128, np.int16, np.float16, ml_dtypes.bfloat16], ids=str
)
@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
def test_the_bits_are_those_of_one_process(num_workers, num_local, dtype, staged):
    rng = np.random.default_rng(0)
    workers = groups(num_workers)
    together = over(workers, num_local)
    ops = [ReduceOp.SUM, ReduceOp.PROD]
    ops += [ReduceOp.MEAN] if np.dtype(dtype).kind != "i" else [ReduceOp.MIN]
    is_half = np.dtype(dtype).itemsize == 2 and np.dtype(dtype).kind != "i"
    for length in (0, 1, 63, 1000, 70_001):
        for op in ops:
            held = empties(workers, length, dtype, [num_local] * num_workers)
            values = [drawn(rng, length, dtype) for _ in range(num_workers * num_local)]
            for array, value in zip(joined(held), values, strict=True):
                array[:] = value
            calls = [
                functools.partial(one.all_reduce, own, op, own)
                for one, own in zip(together, held, strict=True)
            ]
            staged.clear()
            found = results(*calls)
            expected = kernels.all_reduce(values, op)[0]
            for own, returned in zip(held, found, strict=True):
                assert all(one is other for one, other in zip(own, returned, strict=True))
                for one in own:
                    if is_half and num_local > 1:  # accumulated within a process first, in float32
                        np.testing.assert_allclose(
                            one.astype(np.float32), expected.astype(np.float32), 0.02, 0.1
                        )
                    else:
                        assert one.tobytes() == expected.tobytes(), (op, length)
            assert bool(staged) == (length == 0 or (is_half and num_local > 1))


@pytest.mark.parametrize("way", ["in place", "apart", "slices"])
def test_many_arrays_at_once(way, staged):
    rng = np.random.default_rng(1)
    workers = groups(2)
    together = over(workers, 1)
    shapes = [(3,), (200, 300), (2,), (7, 2), (5000,)]
    sources, targets = (
        list(zip(*(joined(empties(workers, shape)) for shape in shapes), strict=True))
        for _ in range(2)
    )
    values = [[rng.standard_normal(shape) for shape in shapes] for _ in workers]
    for arrays, given in zip(joined(sources), joined(values), strict=True):
        arrays[:] = given
    part = slice(1, 3) if way == "slices" else slice(None)
    outs = targets if way == "apart" else sources

    def columns(of_worker):
        return [[array[part]] for array in of_worker]

    results(
        *(
            functools.partial(one.all_reduce_many, columns(own), ReduceOp.MEAN, columns(out))
            for one, own, out in zip(together, sources, outs, strict=True)
        )
    )
    assert not staged
    for own, given, out in zip(sources, values, outs, strict=True):
        for array, was, reduced, one, two in zip(own, given, out, *values, strict=True):
            np.testing.assert_array_equal(reduced[part], ((one + two) / 2)[part])
            if way == "slices":
                np.testing.assert_array_equal(array[:1], was[:1])
                np.testing.assert_array_equal(array[3:], was[3:])
            if way == "apart":
                np.testing.assert_array_equal(array, was)


@pytest.mark.parametrize("case", ["one is elsewhere", "all are elsewhere", "one is shifted"])
def test_asymmetric_arrays_are_staged(case, staged):
    workers = groups(2)
    (first,), (second,) = empties(workers, 1000)
    own = [first[:500], second[:500]]
    if case == "one is shifted":
        own[1] = second[1:501]
    else:
        own[1] = np.empty(500)
    if case == "they lie elsewhere":
        own[0] = np.empty(500)
    values = [np.random.default_rng(k).standard_normal(500) for k in (0, 1)]
    for array, value in zip(own, values, strict=True):
        array[:] = value
    calls = [
        functools.partial(worker.all_reduce, [array], ReduceOp.SUM, [array])
        for worker, array in zip(workers, own, strict=True)
    ]
    results(*calls)
    assert len(staged) == 2
    for array in own:
        np.testing.assert_array_equal(array, values[0] + values[1])


def test_overlapping_targets_are_not_located():
    symmetric = SymmetricMemory(0, 1, ThreadSegmentAllocator(1))
    (array,) = symmetric.empty(lambda numbers, *_: [numbers], (100,), np.dtype(float), 1)
    front, middle, back = array[:50], array[25:75], array[50:]
    assert symmetric.locate([[front, front]], 1)
    assert symmetric.locate([[front, back]], 1)
    assert symmetric.locate([[front, front], [back, back]], 1)
    assert symmetric.locate([[front, middle]], 1) is None
    assert symmetric.locate([[front, front], [middle, middle]], 1) is None
    assert symmetric.locate([[front, front, front, front]], 2) is None
    assert symmetric.locate([[front, np.empty(50)]], 1) is None


def test_custom_reductions_take_replicas_in_order():
    workers = groups(2)
    held = empties(workers, 3, np.int64, [2, 2])
    for k, array in enumerate(joined(held)):
        array[:] = k + 1
    calls = [
        functools.partial(one.all_reduce, own, FIRST_DIGITS, own)
        for one, own in zip(over(workers, 2), held, strict=True)
    ]
    for found in results(*calls):
        assert [one.tolist() for one in found] == [[1234] * 3] * 2


def test_a_block_is_reused_once_no_worker_has_an_array_in_it():
    rng = random.Random(0)
    segments = ThreadSegmentAllocator(2)
    workers = groups(2, segments=segments)
    kept = [[], []]  # by worker: (array, its content)
    for step in range(150):
        length = rng.choice([0, 1, 7, 1000, 30_000])
        made = empties(workers, length, np.int32, [rng.randrange(3), rng.randrange(1, 3)])
        for own, arrays in zip(kept, made, strict=True):
            for array in arrays:
                assert array.ctypes.data % 64 == 0
                array[:] = step
                own.append((array[1:], step) if rng.random() < 0.5 else (array, step))
        for own in kept:
            rng.shuffle(own)
            del own[rng.randrange(2, 8) :]
        del made, arrays, array
        for array, content in joined(kept):
            assert (array == content).all()
    assert len(segments.opened) == 1  # 150 steps made 40 MB a worker in one of 16


def test_too_large_a_request_is_refused_on_all_and_allocates_nothing():
    segments = ThreadSegmentAllocator(2, free_nbytes=1 << 20)
    workers = groups(2, segments=segments)
    calls = [functools.partial(w.empty, (1 << 17,), np.dtype(float), 1) for w in workers]
    for error in at_once(*calls):
        assert isinstance(error, DeviceError)
        assert "need 2097152 bytes" in str(error)
        assert "1048576 left" in str(error)
    assert not segments.opened
    ((array,), _) = empties(workers, 1 << 16)  # all free memory
    assert array.nbytes == 1 << 19
    assert segments.free == 0


def test_different_arrays_on_workers_are_an_error_and_the_group_goes_on():
    workers = groups(2)
    calls = [
        functools.partial(w.empty, (k + 1,), np.dtype(float), 1) for k, w in enumerate(workers)
    ]
    for error in at_once(*calls):
        assert isinstance(error, CollectiveMismatchError)
        assert "worker 0 called empty(float64[1])" in str(error)
    assert len(empties(workers, 5)) == 2


def test_different_reductions_on_workers_are_an_error_and_write_nothing():
    workers = groups(2)
    (first,), (second,) = empties(workers, 10)
    first[:], second[:] = 1, 2
    calls = (
        lambda: workers[0].all_reduce([first], ReduceOp.SUM, [first]),
        lambda: workers[1].all_reduce([second], ReduceOp.MAX, [second]),
    )
    for error in at_once(*calls):
        assert isinstance(error, CollectiveMismatchError)
    assert first.tolist() == [1] * 10
    assert second.tolist() == [2] * 10


def test_a_failure_during_a_reduction_aborts_the_group(monkeypatch):
    workers = groups(2, timeout_seconds=5.0)
    (first,), (second,) = empties(workers, 10)

    def fail(*_):
        raise ZeroDivisionError("half-way")

    monkeypatch.setattr(workers[1].transport.symmetric_memory, "reduce", fail)
    waiting, failing = at_once(
        lambda: workers[0].all_reduce([first], ReduceOp.SUM, [first]),
        lambda: workers[1].all_reduce([second], ReduceOp.SUM, [second]),
    )
    assert isinstance(failing, ZeroDivisionError)
    assert isinstance(waiting, WorkerLostError)
    assert "worker 1 left a collective half-way: ZeroDivisionError: half-way" in str(waiting)
