"""Gradients of rows: the step of an optimizer on some rows of a variable that has a server."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import examples

import dvkernels as dv

SHAPE = (7, 3)
MAKERS = {
    "sgd": lambda: dv.optimizers.SGD(0.5),
    "momentum": lambda: dv.optimizers.SGD(0.5, momentum=0.5, weight_decay=0.1),
    "adagrad": lambda: dv.optimizers.Adagrad(0.5, weight_decay=0.1),
    "adam": lambda: dv.optimizers.Adam(0.5),
    "adamw": lambda: dv.optimizers.AdamW(0.5),
}


def served(initial):
    strategy = dv.ParameterServerStrategy(num_workers=1)
    with strategy.scope():
        return strategy, dv.Variable(initial)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=examples(12), deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, SHAPE[0] - 1), max_size=9), max_size=3))
def test_a_row_takes_the_step_of_a_variable_of_its_own(name, steps):
    """Rows that have a gradient step as whole variables do; the others, and their slots, stay."""
    random = np.random.default_rng(0)
    initial = random.normal(size=SHAPE)
    strategy, table = served(initial)
    optimizer, twin = MAKERS[name](), MAKERS[name]()
    whole = dv.Variable(initial)
    for ids in steps:
        slopes = random.normal(size=(len(ids), SHAPE[1]))
        dense = np.zeros(SHAPE)
        np.add.at(dense, ids, slopes)
        others = np.setdiff1d(np.arange(SHAPE[0]), ids)
        before = [whole.numpy(), *(slot.numpy() for slot in twin.slots(whole))]
        optimizer.apply_gradients([((ids, slopes), table)])
        twin.apply_gradients([(dense, whole)])
        for kept, now in zip(before, [whole, *twin.slots(whole)], strict=True):
            now.scatter_update(others, kept[others])
    np.testing.assert_array_equal(table, whole)
    for one, other in zip(optimizer.slots(table), twin.slots(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    assert optimizer.steps(table) == twin.steps(whole) == len(steps) == optimizer.iterations
    strategy.close()


@pytest.mark.parametrize("name", MAKERS)
def test_dense_gradients_are_those_of_other_strategies(name):
    strategy, table = served(np.ones(SHAPE, np.float32))
    whole = dv.Variable(np.ones(SHAPE, np.float32))
    gradient = np.arange(21, dtype=np.float32).reshape(SHAPE) - 10
    for variable in (table, whole):
        optimizer = MAKERS[name]()
        for _ in range(2):
            optimizer.apply_gradients([(gradient, variable)], weight=3)
    assert np.array_equal(table, whole)
    strategy.close()


def test_adagrad_is_that_of_the_paper():
    weight, slopes = dv.Variable(np.ones(3)), np.array([[1.0, 0.0, -2.0], [3.0, 0.0, 0.5]])
    optimizer = dv.optimizers.Adagrad(0.1, epsilon=1e-3)
    expected, squares = np.ones(3), np.zeros(3)
    for slope in slopes:
        optimizer.apply_gradients([(slope, weight)])
        squares += slope**2
        expected -= 0.1 * slope / (np.sqrt(squares) + 1e-3)
    np.testing.assert_allclose(weight, expected, rtol=1e-15)
    np.testing.assert_array_equal(optimizer.slots(weight)[0], squares)


def test_first_steps_of_many_workers_make_one_set_of_slots():
    with dv.ParameterServerStrategy(num_workers=4) as strategy:
        with strategy.scope():
            tables = [dv.Variable(np.zeros((5, 2)), name=str(k)) for k in range(8)]
        adagrad = dv.optimizers.Adagrad(1.0)
        coordinator = dv.ClusterCoordinator(strategy)
        for k in range(200):
            pair = ([k % 5], np.ones((1, 2))), tables[k % 8]
            coordinator.schedule(adagrad.apply_gradients, ([pair],))
        coordinator.join()
        assert sum(int(adagrad.steps(table)) for table in tables) == 200
        squares = [adagrad.slots(table)[0].numpy() for table in tables]
    assert np.array_equal(squares, np.full((8, 5, 2), 5.0))


def test_a_pair_is_a_gradient_of_rows_only_where_there_is_a_server():
    weight = dv.Variable(np.zeros((2, 2)))
    dv.optimizers.SGD(1.0).apply_gradients([(([1.0, 2.0], [3.0, 4.0]), weight)])
    assert weight.numpy().tolist() == [[-1.0, -2.0], [-3.0, -4.0]]
