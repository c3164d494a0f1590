"""Worker groups over shared memory: the laws, the consistency check, and no endless wait."""

from __future__ import annotations

import functools
import time

import numba
import numpy as np
import pytest
from threads_as_workers import Together, at_once, transports

from dvkernels import kernels
from dvkernels.communicators.base import Workers
from dvkernels.communicators.bucketing import Bucketing
from dvkernels.communicators.hierarchical import Hierarchical
from dvkernels.communicators.local import Local
from dvkernels.communicators.workers.consistency import fingerprint_of
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.communicators.workers.shm.segment import BUFFER_NBYTES
from dvkernels.communicators.workers.shm.transport import SharedMemoryTransport
from dvkernels.custom_reduction import CustomReduction
from dvkernels.errors import CollectiveMismatchError, CollectiveTimeoutError, WorkerLostError
from dvkernels.reduce_op import ReduceOp
from dvkernels.testing import check_communicator
from dvkernels.verbs import all_reduce_each


def groups(size, timeout_seconds=20.0):
    return [WorkerGroup(transport) for transport in transports(size, timeout_seconds)]


def sums(workers, value=1.0):
    return at_once(*(lambda w=w: w.reduce([np.full(3, value)], ReduceOp.SUM) for w in workers))


def test_the_laws_of_communicators_over_shared_memory():
    check_communicator(Together, sizes=(1, 2, 3))


def test_the_laws_of_communicators_for_replicas_of_workers():
    check_communicator(lambda size: Together(size, 2), sizes=[4])


@pytest.mark.parametrize("extra", [-8, 0, 8, BUFFER_NBYTES + 24])
def test_arrays_of_several_pieces(extra):
    values = [np.arange((BUFFER_NBYTES + extra) // 8) * (k + 1.0) for k in range(3)]
    together = Together(3)
    for found in together.all_reduce(values, ReduceOp.SUM):
        np.testing.assert_array_equal(found, sum(values))
    uneven = [value[: 1 + 5 * k * k * 100] for k, value in enumerate(values)]
    for found in together.all_gather(uneven, 0):
        np.testing.assert_array_equal(found, np.concatenate(uneven))
    for found in together.broadcast(values, 1):
        np.testing.assert_array_equal(found, values[1])


@pytest.mark.parametrize("may_spin", [True, False], ids=["spins", "sleeps at once"])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32", "complex128"])
@pytest.mark.parametrize("num_workers", [2, 4, 5])
def test_the_compiled_all_reduce_has_the_bits_of_the_kernels(num_workers, dtype, may_spin):
    dtype = np.dtype(dtype)
    workers = [WorkerGroup(one) for one in transports(num_workers, may_spin=may_spin)]
    rng = np.random.default_rng(0)
    step = BUFFER_NBYTES // dtype.itemsize
    ops = [op for op in ReduceOp if not (op is ReduceOp.MEAN and dtype.kind in "iu")]
    for op in ops if dtype.kind != "c" else (ReduceOp.SUM, ReduceOp.MEAN, ReduceOp.PROD):
        for length in (0, 1, step - 1, step, step + 1, 3 * step + 5):
            values = [rng.integers(-4, 5, length).astype(dtype) for _ in workers]
            expected = kernels.all_reduce(values, op, out=[value.copy() for value in values])

            def in_place(k, values=values, op=op):
                own = values[k].copy()
                apart = workers[k].all_reduce([values[k]], op)[0]
                return apart, workers[k].all_reduce([own], op, [own])[0]

            for found in at_once(*(functools.partial(in_place, k) for k in range(num_workers))):
                for one in found:
                    assert one.tobytes() == expected[0].tobytes(), (op, length)


@pytest.mark.parametrize("dtype", ["float16", "int32", "float32", "complex64"])
@pytest.mark.parametrize(("num_workers", "num_local"), [(2, 2), (2, 3), (4, 2)])
def test_replicas_of_workers_reduce_in_one_pass_as_they_do_in_two(
    dtype, num_workers, num_local, monkeypatch
):
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(0)
    num_pieces = 0
    original = WorkerGroup.all_reduce_columns

    def one_pass(self, columns, how, outs=None):
        nonlocal num_pieces
        results = original(self, columns, how, outs)
        num_pieces += results is not None
        return results

    for op in (ReduceOp.SUM, ReduceOp.MEAN, ReduceOp.PROD):
        if op is ReduceOp.MEAN and dtype.kind == "i":
            continue
        for length in (0, 3, 2 * BUFFER_NBYTES // dtype.itemsize + 5):
            values = [
                rng.standard_normal(length).astype(dtype, casting="unsafe")
                for _ in range(num_workers * num_local)
            ]
            found = []
            for how in (one_pass, lambda *_: None):
                monkeypatch.setattr(WorkerGroup, "all_reduce_columns", how)
                together = Together(num_workers * num_local, num_local)
                for _ in range(2):  # the second time in compiled code
                    apart = together.all_reduce(values, op)
                    own = [value.copy() for value in values]
                    in_place = together.all_reduce(own, op, own)
                assert all(one is other for one, other in zip(in_place, own, strict=True))
                found += [one.tobytes() for one in [*apart, *in_place]]
            assert len({*found}) == 1, (op, length)
    assert (num_pieces > 0) == (
        dtype != np.float16
    )  # halves are rounded once, after the last level


@pytest.mark.parametrize(
    "who_packs", [(), (0,), (0, 1, 2, 3)], ids=["none packs", "one packs", "all pack"]
)
@pytest.mark.parametrize("num_local", [1, 2])
@pytest.mark.parametrize("num_workers", [2, 4])
def test_many_arrays_reduce_at_once_as_they_do_one_by_one(
    num_workers, num_local, who_packs, monkeypatch
):
    rng = np.random.default_rng(0)
    shapes = [(3,), (0,), (), (200, 300), (5, 0), (1,), (BUFFER_NBYTES // 8,), (7, 2)]
    columns = [
        [rng.standard_normal(shape).astype(dtype) for _ in range(num_workers * num_local)]
        for shape in shapes
        for dtype in ("float64", "float32")
    ]
    columns[6] = [np.asfortranarray(value) for value in columns[6]]
    together = Together(num_workers * num_local, num_local)
    for worker, communicator in enumerate(together.communicators):
        if num_local == 1:
            together.communicators[worker] = Hierarchical(
                Local(1, "auto"), communicator, [1] * num_workers
            )
        if worker in who_packs:
            transport = together.communicators[worker]._workers.transport
            monkeypatch.setattr(transport._all_reduce, "lay_out", lambda *_: False)

    def many(worker):
        own = slice(worker * num_local, (worker + 1) * num_local)
        given = [column[own] for column in columns]
        return together.communicators[worker].all_reduce_many(given, ReduceOp.MEAN)

    for results in at_once(*(functools.partial(many, worker) for worker in range(num_workers))):
        for column, found in zip(columns, results, strict=True):
            expected = together.all_reduce(column, ReduceOp.MEAN)[0]
            for one in found:
                assert one.shape == column[0].shape
                assert one.tobytes() == expected.tobytes()


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("is_apart", [False, True], ids=["contiguous", "one is not"])
@pytest.mark.parametrize("length", [0, 1, 2048, 2049])
def test_short_arrays_have_the_bits_of_others(length, is_apart, is_late):
    rng = np.random.default_rng(length)
    values = [rng.standard_normal(length) for _ in range(3)]
    given = [np.repeat(values[0], 2)[::2] if is_apart else values[0], *values[1:]]

    def reduce(worker, communicator):
        for _ in range(3):
            time.sleep(0.01 * (is_late and worker == 1))
            found = communicator.all_reduce([given[worker]], ReduceOp.MEAN)[0]
        return found

    workers = groups(3)
    expected = kernels.all_reduce([value.copy() for value in values], "mean")[0]
    calls = [functools.partial(reduce, rank, worker) for rank, worker in enumerate(workers)]
    for found in at_once(*calls):
        assert found.tobytes() == expected.tobytes()


def test_a_worker_that_stops_between_two_pieces_is_named_in_the_timeout(monkeypatch):
    workers = groups(2, timeout_seconds=0.5)
    values = [np.ones(3 * BUFFER_NBYTES // 8), np.ones(BUFFER_NBYTES // 8)]
    alike = fingerprint_of("all_reduce", "as many as there are")
    monkeypatch.setattr("dvkernels.communicators.workers.group._all_reduce_of", lambda *_: alike)
    longer, shorter = at_once(
        *(lambda k=k: workers[k].reduce([values[k]], ReduceOp.SUM) for k in (0, 1))
    )
    assert isinstance(longer, CollectiveTimeoutError)
    assert "in vain for workers [1]" in str(longer)
    assert shorter.tolist() == [2.0] * (BUFFER_NBYTES // 8)


def test_more_workers_than_a_table_of_arrays_has_rows():
    workers = [WorkerGroup(one) for one in transports(66, timeout_seconds=60.0)]
    values = [np.full(BUFFER_NBYTES // 8 + 3, k) for k in range(66)]
    pairs = zip(workers, values, strict=True)
    for found in at_once(*(functools.partial(w.reduce, [v], ReduceOp.SUM) for w, v in pairs)):
        assert set(found.tolist()) == {66 * 65 // 2}


def test_empty_rows_are_counted():
    found = Together(2).all_gather([np.empty((2, 0)), np.empty((3, 0))], 0)
    assert [one.shape for one in found] == [(5, 0), (5, 0)]


def test_custom_reductions_take_workers_in_order():
    first = CustomReduction(numba.njit(lambda a, b: a * 10 + b), 0, "digits")
    values = [np.full(2, k + 1) for k in range(3)]
    for found in Together(3).all_reduce(values, first):
        assert found.tolist() == [123, 123]


def test_messages():
    workers = groups(3)
    assert all(isinstance(worker, Workers) for worker in workers)
    found = at_once(*(lambda w=w: w.exchange({"rank": w.rank}) for w in workers))
    assert found == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3
    at_once(*(worker.barrier for worker in workers))


def test_a_mismatch_names_all_calls_and_the_group_goes_on():
    workers = groups(3)
    ones = np.ones(3)
    for _ in range(2):
        found = at_once(
            lambda: workers[0].reduce([ones], ReduceOp.SUM),
            lambda: workers[1].reduce([ones], ReduceOp.MAX),
            lambda: workers[2].all_gather([ones], 0),
        )
        for error in found:
            assert isinstance(error, CollectiveMismatchError)
            for said in ("worker 0 called all_reduce(sum, float64[3])",
                         "worker 1 called all_reduce(max, float64[3])",
                         "worker 2 called all_gather(axis 0, float64[any])",
                         "test_worker_group.py"):  # fmt: skip
                assert said in str(error)
        np.testing.assert_array_equal(sums(workers), np.full((3, 3), 3.0))


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_failure_reaches_waiting_workers_and_the_next_step_works(num_failures):
    workers = groups(3)
    beside = [worker.duplicate() for worker in workers]
    sums(workers)
    for _ in range(num_failures):
        workers[1].announce(ZeroDivisionError("of worker 1"))
        first, third = at_once(
            lambda: workers[0].reduce([np.ones(3)], ReduceOp.SUM), workers[2].barrier
        )
        for error in (first, third):
            assert isinstance(error, CollectiveMismatchError)
            assert "worker 1 raised ZeroDivisionError: of worker 1" in str(error)
        workers[0].announce(first)  # known to all workers, so not announced again
        # Pending announcements go out with the next call, here the second.
    np.testing.assert_array_equal(sums(workers), np.full((3, 3), 3.0))
    np.testing.assert_array_equal(sums(beside, 2.0), np.full((3, 3), 6.0))
    np.testing.assert_array_equal(sums(workers), np.full((3, 3), 3.0))


def test_workers_that_fail_at_once_go_on_together():
    workers = groups(3)
    for worker in workers:
        worker.announce(ValueError(f"of {worker.rank}"))
    np.testing.assert_array_equal(sums(workers), np.full((3, 3), 3.0))
    np.testing.assert_array_equal(sums([w.duplicate() for w in workers]), np.full((3, 3), 3.0))


def test_two_threads_of_each_worker_have_separate_call_orders():
    workers = groups(2)
    beside = [worker.duplicate() for worker in workers]

    def often(worker, value):
        return [float(worker.reduce([np.array(value)], ReduceOp.SUM)) for _ in range(200)]

    found = at_once(
        *(lambda w=w: often(w, 1.0) for w in workers), *(lambda w=w: often(w, 2.0) for w in beside)
    )
    assert found == [[2.0] * 200] * 2 + [[4.0] * 200] * 2


def test_a_deadline_names_the_absent():
    workers = groups(3, timeout_seconds=0.5)
    sums(workers)
    began = time.monotonic()
    first, third = at_once(workers[0].barrier, workers[2].barrier)
    assert time.monotonic() - began < 20
    late = at_once(workers[1].barrier)[0]
    for error in (first, third, late):
        assert isinstance(error, CollectiveTimeoutError)
        assert "in vain for workers [1] to call barrier()" in str(error)
        assert "last seen in all_reduce(sum, float64[3])" in str(error)


def test_a_worker_that_left_is_lost():
    found = transports(2)
    found[1].leave("ValueError: of its own")
    (error,) = at_once(WorkerGroup(found[0]).barrier)
    assert isinstance(error, WorkerLostError)
    assert "worker 1 is lost while barrier() waits for it: ValueError: of its own" in str(error)


def test_an_interrupt_half_way_aborts_the_group(monkeypatch):
    workers = groups(2)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(workers[0].transport, "_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workers[0].barrier()
    (error,) = at_once(workers[1].barrier)
    assert isinstance(error, WorkerLostError)
    assert "worker 0 left a collective half-way: KeyboardInterrupt" in str(error)


def test_a_worker_that_has_aborted_the_group_sends_no_data():
    for _ in range(50):
        one, other = (WorkerGroup(transport) for transport in transports(2))

        def ends(worker=one):
            worker.end(WorkerLostError("of the test"))
            return worker.exchange("wrong")

        for error in at_once(ends, lambda worker=other: worker.exchange("right")):
            assert isinstance(error, WorkerLostError)
            assert str(error) == "of the test"


def test_declined_columns_are_not_reduced_twice(monkeypatch):
    """Arrays of one dtype go in one pass, those of another do not; none is reduced twice."""

    class Own(np.ndarray):
        pass

    seen = []
    into = SharedMemoryTransport.all_reduce_into

    def noted(self, columns, *rest):
        seen.append((self.rank, sum(column[0].size for column in columns)))
        return into(self, columns, *rest)

    monkeypatch.setattr(SharedMemoryTransport, "all_reduce_into", noted)
    plain, own = np.ones(5), np.ones(7, "f4").view(Own)
    workers = [WorkerGroup(transport) for transport in transports(2)]
    bucketing = [Bucketing(Hierarchical(Local(2, "auto"), one, [2, 2]), 1 << 20) for one in workers]
    columns = [[plain] * 2, [own] * 2]
    calls = (functools.partial(all_reduce_each, one, columns, ReduceOp.SUM) for one in bucketing)
    for found in at_once(*calls):
        assert [set(array.tolist()) for column in found for array in column] == [{4.0}] * 4
    assert sorted(seen) == [(0, 5), (0, 7), (1, 5), (1, 7)]
