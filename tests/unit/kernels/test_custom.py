"""Custom reductions: accepted by every algorithm, kernel and strategy."""

from __future__ import annotations

import functools

import numba
import numpy as np
import pytest
from kinds import devices, kernels, smaller

import dvkernels as dv
from dvkernels import errors


@numba.njit
def larger(a, b):
    return a if abs(a) >= abs(b) else b


@numba.njit
def xor(a, b):
    return a ^ b


LARGER = dv.CustomReduction(larger, 0, "largest magnitude")
XOR = dv.CustomReduction(xor, 0, "xor")


def made(dtype):
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(smaller(5003)) * 50 for _ in range(4)]
    return [one > 0 if dtype == "?" else one.astype(dtype) for one in values]


@pytest.mark.parametrize(
    ("op", "dtype"), [(LARGER, "f4"), (LARGER, "c16"), (XOR, "i4"), (XOR, "u2"), (XOR, "?")]
)
def test_every_algorithm_takes_it(op, dtype):
    fold = np.bitwise_xor if op is XOR else lambda a, b: np.where(abs(a) >= abs(b), a, b)
    expected = functools.reduce(fold, made(dtype))
    for algorithm in ("auto", "direct", "ring"):
        buffers = made(dtype)
        out = kernels.all_reduce(buffers, op, algorithm=algorithm, out=made(dtype))
        kernels.all_reduce(buffers, op, algorithm=algorithm)
        for array in (*buffers, *out):
            np.testing.assert_array_equal(array, expected, err_msg=algorithm)


def test_the_other_kernels_take_it():
    buffers = made("i8")
    expected = functools.reduce(np.bitwise_xor, buffers)
    np.testing.assert_array_equal(kernels.reduce(buffers, XOR), expected)
    np.testing.assert_array_equal(np.concatenate(kernels.reduce_scatter(buffers, XOR)), expected)
    kernels.all_reduce_many([buffers], XOR)
    np.testing.assert_array_equal(buffers[2], expected)


def test_functions_may_call_others_and_have_free_variables():
    @numba.njit
    def distance(x, near):
        return abs(x - near)

    def closer_to(near):
        return numba.njit(lambda a, b: a if distance(a, near) <= distance(b, near) else b)

    buffers = made("f4")
    for near in (3, -40):
        op = dv.CustomReduction(closer_to(near), np.inf, f"closer to {near}")
        expected = functools.reduce(
            lambda a, b, near=near: np.where(abs(a - near) <= abs(b - near), a, b), buffers
        )
        np.testing.assert_array_equal(kernels.reduce(buffers, op), expected)


def test_strategies_take_it():
    with dv.MirroredStrategy(devices(3)) as strategy:
        values = dv.PerReplica([np.array([1.0, -5.0]), np.array([-3.0, 2.0]), np.zeros(2)])
        np.testing.assert_array_equal(strategy.reduce(LARGER, values), [-3, -5])
        np.testing.assert_array_equal(strategy.reduce(LARGER, values, axis=0), -5)
        result = strategy.run(
            lambda value: dv.get_replica_context().all_reduce(LARGER, value), (values,)
        )
        for array in result.values:
            np.testing.assert_array_equal(array, [-3, -5])
        empty = dv.PerReplica([np.zeros((0, 2))] * 3)
        np.testing.assert_array_equal(strategy.reduce(LARGER, empty, axis=0), [0, 0])


def test_replicas_must_pass_the_same_reduction():
    def step():
        op = dv.CustomReduction(larger, 0, "made in run")
        dv.get_replica_context().all_reduce(op, np.ones(2))

    with (
        dv.MirroredStrategy(devices(2)) as strategy,
        pytest.raises(errors.CollectiveMismatchError),
    ):
        strategy.run(step)


@pytest.mark.parametrize("dtype", ["f2", "O", ">f4"])
def test_unsupported_dtypes_raise(dtype):
    with pytest.raises(errors.UnsupportedDTypeError):
        kernels.all_reduce([np.ones(3).astype(dtype) for _ in range(2)], LARGER)


def test_a_function_that_does_not_compile_touches_nothing():
    buffers = [np.ones(3), np.ones(3)]
    op = dv.CustomReduction(xor, 0, "xor")
    with pytest.raises(errors.UnsupportedDTypeError, match=r"xor.*float64"):
        kernels.all_reduce(buffers, op)
    assert (np.array(buffers) == 1).all()


@pytest.mark.parametrize("arguments", [(max, 0, "x"), (None, 0, "x"), (larger, 0, 3)])
def test_nonsense_raises(arguments):
    with pytest.raises(TypeError, match="CustomReduction"):
        dv.CustomReduction(*arguments)
