"""Collectives inside compiled code: results, mismatches, deadlines."""

from __future__ import annotations

import threading
import time

import numba
import numpy as np
import pytest

from dvkernels import errors
from dvkernels.kernels.cpu import group
from dvkernels.kernels.cpu.engine import intrinsics


@numba.njit(nogil=True)
def many_steps(state, rank, values, copied, count):
    for number in range(count):
        group.all_reduce(state, rank, values)
        group.barrier(state, rank)
        values += rank
        copied[0] = rank + number
        group.broadcast(state, rank, copied, number % 3)
        values[0] += copied[0]


@numba.njit(nogil=True)
def reductions(state, rank, values, results):
    results[:] = values
    group.all_reduce(state, rank, results[0], "mean")
    group.all_reduce(state, rank, results[1], "min")
    group.all_reduce(state, rank, results[2], "max")
    group.all_reduce(state, rank, results[3], "prod")


@numba.njit(nogil=True)
def barriers(state, rank, count):
    for _ in range(count):
        group.barrier(state, rank)


@numba.njit(nogil=True)
def reduce_once(state, rank, values):
    group.all_reduce(state, rank, values)


@numba.njit(nogil=True)
def broadcast_once(state, rank, values, root):
    group.broadcast(state, rank, values, root)


def together(*calls):
    """Run the calls on threads of their own; return what each raised."""
    raised = [None] * len(calls)

    def run(k):
        try:
            calls[k]()
        except Exception as error:
            raised[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


def test_many_collectives_in_a_row():
    team = group.Group(3)
    values = [np.full(11, float(rank)) for rank in range(3)]
    copied = [np.zeros(5, "i2") for _ in range(3)]
    count = 40
    calls = [
        lambda rank=rank: many_steps(team.state, rank, values[rank], copied[rank], count)
        for rank in range(3)
    ]
    assert together(*calls) == [None] * 3
    expected = [np.full(11, float(rank)) for rank in range(3)]
    for number in range(count):
        total = sum(expected)
        expected = [total + rank for rank in range(3)]
        for array in expected:
            array[0] += number % 3 + number
    for array, right in zip(values, expected, strict=True):
        np.testing.assert_array_equal(array, right)


@pytest.mark.parametrize("length", [0, 1, 2, 1000])
def test_reductions_are_those_of_numpy(length):
    rng = np.random.default_rng(0)
    team = group.Group(2)
    values = [rng.standard_normal((4, length)) for _ in range(2)]
    results = [np.empty((4, length)) for _ in range(2)]
    calls = [
        lambda rank=rank: reductions(team.state, rank, values[rank], results[rank])
        for rank in range(2)
    ]
    assert together(*calls) == [None] * 2
    a, b = values
    expected = [(a[0] + b[0]) / 2, np.minimum(a[1], b[1]), np.maximum(a[2], b[2]), a[3] * b[3]]
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_a_missing_replica_ends_the_wait_at_the_deadline():
    team = group.Group(3, timeout_seconds=1)
    barriers(group.Group(1).state, 0, 1)  # compiled
    began = time.monotonic()
    raised = together(*[lambda rank=rank: barriers(team.state, rank, 1) for rank in range(2)])
    assert time.monotonic() - began < 20
    kinds = {type(error) for error in raised}
    assert errors.CollectiveTimeoutError in kinds
    assert kinds <= {errors.CollectiveTimeoutError, errors.CollectiveMismatchError}
    with pytest.raises(errors.CollectiveMismatchError, match="aborted"):
        barriers(team.state, 0, 1)
    team.reset()
    assert (
        together(*[lambda rank=rank: barriers(team.state, rank, 5) for rank in range(3)])
        == [None] * 3
    )


def test_abort_ends_every_wait_at_once():
    team = group.Group(2)
    barriers(group.Group(1).state, 0, 1)
    threading.Timer(0.2, team.abort).start()
    began = time.monotonic()
    (error,) = together(lambda: barriers(team.state, 0, 1))
    assert isinstance(error, errors.CollectiveMismatchError)
    assert time.monotonic() - began < 20


@numba.njit(nogil=True)
def reduce_mean(state, rank, values):
    group.all_reduce(state, rank, values, "mean")


@numba.njit(nogil=True)
def broadcast_from_first(state, rank, values):
    group.broadcast(state, rank, values, 0)


@numba.njit(nogil=True)
def broadcast_from_second(state, rank, values):
    group.broadcast(state, rank, values, 1)


@numba.njit(nogil=True)
def wait_twice(state, rank, values):
    group.barrier(state, rank)
    group.barrier(state, rank)


def ones(shape=8, dtype="f8", order="C"):
    return lambda: np.ones(shape, dtype, order)


@pytest.mark.parametrize(
    ("function", "array", "other_function", "other_array"),
    [
        (reduce_once, ones(), reduce_once, ones(9)),
        (reduce_once, ones(), reduce_once, ones(dtype="i1")),  # other size in bytes
        (reduce_once, ones(), reduce_once, ones(dtype="i8")),  # same size, other dtype
        (reduce_once, ones((2, 4)), reduce_once, ones((2, 4), order="F")),
        (reduce_once, ones(), reduce_mean, ones()),
        (reduce_once, ones(), broadcast_from_first, ones()),
        (reduce_once, ones(), wait_twice, ones()),
        (wait_twice, ones(), broadcast_from_first, ones()),
        (broadcast_from_first, ones(), broadcast_from_first, ones(64, "i1")),
        (broadcast_from_first, ones(), broadcast_from_second, ones()),
    ],
)
def test_different_calls_raise_on_all_replicas_before_any_write(
    function, array, other_function, other_array
):
    for odd in range(3):
        team = group.Group(3, timeout_seconds=60)
        arrays = [(other_array if rank == odd else array)() for rank in range(3)]
        functions = [other_function if rank == odd else function for rank in range(3)]
        raised = together(
            *[
                lambda rank=rank: functions[rank](team.state, rank, arrays[rank])  # noqa: B023
                for rank in range(3)
            ]
        )
        assert [type(error) for error in raised] == [errors.CollectiveMismatchError] * 3
        assert all((values == 1).all() for values in arrays)
        team.reset()
        calls = [lambda rank=rank: barriers(team.state, rank, 2) for rank in range(3)]  # noqa: B023
        assert together(*calls) == [None] * 3


def test_states_that_are_no_groups_are_refused():
    for state in (np.zeros(2, np.int64), np.zeros(100, np.int64), group.Group(1).state[1:].copy()):
        for function in (reduce_once, broadcast_from_first, wait_twice):
            with pytest.raises(ValueError, match="no state of a Group"):
                function(state, 0, np.ones(3))


def test_a_read_only_array_is_read_and_never_written():
    fixed = np.ones(3)
    fixed.flags.writeable = False
    broadcast_from_first(group.Group(1).state, 0, fixed)
    team = group.Group(2)
    raised = together(
        lambda: broadcast_from_first(team.state, 0, np.full(3, 5.0)),
        lambda: broadcast_from_first(team.state, 1, fixed),
    )
    assert isinstance(raised[0], errors.CollectiveMismatchError)
    assert isinstance(raised[1], ValueError)
    assert (fixed == 1).all()


def test_compiled_deadlines_use_a_monotonic_clock():
    assert abs(intrinsics.milliseconds() - 1000 * time.monotonic()) < 10_000
    assert abs(intrinsics.milliseconds() - 1000 * time.time()) > 1e9


def test_a_rank_out_of_range():
    with pytest.raises(ValueError, match="rank or a root"):
        reduce_once(group.Group(1).state, 1, np.ones(3))
    with pytest.raises(ValueError, match="rank or a root"):
        broadcast_once(group.Group(1).state, 0, np.ones(3), 1)


@pytest.mark.parametrize("array", [np.ones((3, 3))[:, 1], np.ones(3, "c8"), np.ones(3, "f2")])
def test_arrays_that_do_not_fit(array):
    with pytest.raises((numba.core.errors.TypingError, NotImplementedError)):
        reduce_once(group.Group(1).state, 0, array)


@pytest.mark.parametrize("arguments", [(0,), (2, 0), (2, -1), (2, float("inf"))])
def test_nonsense_raises(arguments):
    with pytest.raises(ValueError, match="at least 1 replica"):
        group.Group(*arguments)
    with pytest.raises(TypeError, match=r"numba\.njit"):
        group.all_reduce(None, 0, None)
