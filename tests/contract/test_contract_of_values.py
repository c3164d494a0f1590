"""PerReplica and Mirrored: allowed and refused operations."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kinds import devices

import dvkernels as dv

CALLS = r"strategy\.(reduce|gather|local_results)"


@pytest.mark.parametrize("kind", [dv.PerReplica, dv.Mirrored])
def test_holds_its_values_in_order(kind: Any) -> None:
    first, second = np.ones(2), np.zeros(3)
    value = kind([first, second])
    assert isinstance(value, dv.DistributedValues)
    assert type(value.values) is tuple
    assert len(value) == len(value.values) == len(value.devices) == 2
    for at, one in enumerate((first, second)):
        assert value[at] is value.on(at) is value.values[at] is one
    for wrong in (2, 7):
        with pytest.raises(IndexError, match=str(wrong)):
            value.on(wrong)
        with pytest.raises(IndexError, match=str(wrong)):
            value[wrong]
    assert len(repr(kind([np.zeros(10**6)] * 4))) < 1000
    assert kind.__name__ in repr(value)


@pytest.mark.parametrize("kind", [dv.PerReplica, dv.Mirrored])
def test_frozen_and_equal_only_to_itself(kind: Any) -> None:
    value = kind([1, 2])
    for name in ("values", "devices", "anything"):
        with pytest.raises(AttributeError):
            setattr(value, name, ())
    with pytest.raises((AttributeError, TypeError)):
        del value.values
    with pytest.raises(TypeError):
        value[0] = 5
    assert value.values == (1, 2)
    assert value == value
    assert (value == kind([1, 2])) is False
    assert value != kind([1, 2])
    assert {value: "by identity"}[value] == "by identity"


@pytest.mark.parametrize("kind", [dv.PerReplica, dv.Mirrored])
def test_no_iteration_and_no_truth_value(kind: Any) -> None:
    value = kind([1, 2])
    for use in (iter, list, bool, lambda x: 1 in x, lambda x: not x, lambda x: [*x]):
        with pytest.raises(TypeError):
            use(value)


BINARY = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.matmul,
    operator.and_,
    operator.or_,
    operator.xor,
    operator.lshift,
]
ORDERS = [operator.lt, operator.le, operator.gt, operator.ge]
UNARY: list[Callable[[Any], Any]] = [
    operator.neg,
    operator.pos,
    operator.abs,
    operator.invert,
    float,
    int,
    complex,
    round,
    operator.index,
    np.asarray,
    np.array,
    np.sum,
    np.exp,
    np.mean,
    np.sqrt,
    np.negative,
    lambda x: np.concatenate([x, x]),
    lambda x: np.add(x, 1),
    lambda x: np.add(np.ones(2), x),
    lambda x: np.stack([x]),
    lambda x: np.add.reduce(x),
    lambda x: np.dot(x, x),
]


@pytest.mark.parametrize("use", BINARY + ORDERS, ids=lambda use: use.__name__)
@pytest.mark.parametrize("other", [1, 1.0, np.float64(1), np.ones(2)], ids=repr)
def test_operators_are_refused(use: Callable[[Any, Any], Any], other: Any) -> None:
    value = dv.PerReplica([np.ones(2), np.ones(2)])
    for given in ((value, other), (other, value), (value, value)):
        with pytest.raises(TypeError, match=CALLS):
            use(*given)


@pytest.mark.parametrize("use", UNARY)
def test_conversions_to_numbers_and_arrays_are_refused(use: Callable[[Any], Any]) -> None:
    for held in (1.0, np.ones(2)):
        with pytest.raises(TypeError, match=CALLS):
            use(dv.PerReplica([held, held]))


def test_no_augmented_assignment() -> None:
    array = np.ones(2)
    value = kept = dv.PerReplica([np.ones(2)] * 2)
    with pytest.raises(TypeError, match=CALLS):
        array += value
    with pytest.raises(TypeError, match=CALLS):
        value += 1
    assert value is kept
    assert array.tolist() == [1.0, 1.0]


def test_copy_to_a_device_is_the_callers(two: dv.Strategy) -> None:
    value = two.distribute_values_from_function(
        lambda context: np.full(2, float(context.replica_id_in_sync_group))
    )
    copied = value.copy_to("cpu:1")
    assert len(copied) == 2
    for at in range(2):
        assert np.array_equal(copied[at], value[at])
        assert not np.shares_memory(copied[at], value[at])
    assert {str(device) for device in copied.devices} == {"cpu:1"}
    with pytest.raises(dv.errors.DeviceError):
        value.copy_to("gpu:nowhere")


def test_a_replica_means_its_own_component(two: dv.Strategy) -> None:
    value = two.distribute_values_from_function(
        lambda context: np.full(2, 1.0 + context.replica_id_in_sync_group)
    )
    nested = two.run(
        lambda given: {"doubled": given["x"][0] * 2},
        kwargs={"given": {"x": [value]}},
    )
    assert [one.tolist() for one in nested["doubled"].values] == [[2.0, 2.0], [4.0, 4.0]]
    total = two.run(lambda: dv.get_replica_context().all_reduce("sum", value))
    assert [one.tolist() for one in total.values] == [[3.0, 3.0]] * 2


def test_a_table_in_notebooks() -> None:
    html = dv.PerReplica([np.ones(2), "<script>"])._repr_html_()
    assert "<table" in html
    assert "<script>" not in html
    assert len(re.findall("<tr", html)) >= 2


def test_copies_are_allowed_and_empty_values_refused() -> None:
    value = dv.PerReplica([np.ones(2), np.ones(2)])
    other = copy.deepcopy(value)
    assert not np.shares_memory(other[0], value[0])
    for kind in (dv.PerReplica, dv.Mirrored):
        with pytest.raises((ValueError, TypeError)):
            kind([])
        with pytest.raises(TypeError):
            kind(3)


def test_values_do_not_communicate() -> None:
    """Values are created and read in any context, even by a single replica."""
    with dv.MirroredStrategy(devices(2)) as strategy:

        def alone() -> int:
            if dv.get_replica_context().replica_id_in_sync_group == 0:
                value = dv.PerReplica([1, 2])
                assert repr(value)
                assert dv.Mirrored([3, 3]).values == (3, 3)
                return len(value)
            return 0

        assert strategy.run(alone).values == (2, 0)
