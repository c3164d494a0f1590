"""Writes of large variables, which several cores share, are those of small ones."""

from __future__ import annotations

import numpy as np
import pytest

import dvkernels as dv

LENGTHS = [10, 300_000]  # the second is written by several cores


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(["cpu:0", "cpu:1", "cpu:2"]) as made:
        yield made


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.complex128])
def test_every_copy_gets_the_value(strategy, length, dtype):
    value = np.random.default_rng(0).integers(0, 100, length).astype(dtype)
    with strategy.scope():
        vector = dv.Variable(np.zeros(length, dtype), aggregation="sum")
        matrix = dv.Variable(np.zeros((length // 5, 5), dtype))
    for new in (value, value[::-1]):
        vector.assign(new)
        np.testing.assert_array_equal(vector.values, [new] * 3)
    vector.assign(vector.read_value()[::-1])  # a view of what is written
    np.testing.assert_array_equal(vector.values, [value] * 3)
    matrix.assign(value.reshape(5, -1).T)
    np.testing.assert_array_equal(matrix.values, [value.reshape(5, -1).T] * 3)
    vector.assign_sub(value)
    strategy.run(lambda: vector.assign(value))
    np.testing.assert_array_equal(vector.values, [value + value + value] * 3)


@pytest.mark.parametrize("length", LENGTHS)
def test_variables_are_brought_together(strategy, length):
    with strategy.scope():
        variables = [dv.Variable(np.zeros(length), synchronization="none") for _ in range(2)]
    for variable in variables:
        variable.assign(dv.PerReplica([np.full(length, float(k)) for k in range(3)]))
    dv.sync(variables, "sum")
    for variable in variables:
        np.testing.assert_array_equal(variable.values, np.full((3, length), 3.0))
