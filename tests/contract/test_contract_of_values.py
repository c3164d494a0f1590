"""PerReplica and Mirrored: allowed and refused operations."""

from __future__ import annotations

import copy
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from shorthands import replica

import dvkernels as dv

CALLS = r"strategy\.(reduce|gather|local_results)"
both = pytest.mark.parametrize("kind", [dv.PerReplica, dv.Mirrored])


@both
def test_holds_its_values_in_order(kind: Any) -> None:
    first, second = np.ones(2), np.zeros(3)
    value = kind([first, second])
    assert isinstance(value, dv.DistributedValues)
    assert type(value.values) is tuple
    assert len(value) == len(value.values) == len(value.devices) == 2
    for at, one in enumerate((first, second)):
        assert value[at] is value.on(at) is value.values[at] is one
    for wrong in (-1, 2, 7):
        for ask in (value.on, value.__getitem__):
            with pytest.raises(IndexError, match=rf"{wrong}.*replicas 0 to 1"):
                ask(wrong)
    with pytest.raises(TypeError, match="integer"):
        value.on("0")


@both
def test_frozen_and_equal_only_to_itself(kind: Any) -> None:
    value = kind([1, 2])
    for name in ("values", "devices", "anything"):
        with pytest.raises(AttributeError, match="frozen"):
            setattr(value, name, ())
        with pytest.raises(AttributeError, match="frozen"):
            delattr(value, name)
    with pytest.raises(TypeError):
        value[0] = 5
    assert value.values == (1, 2)
    assert value == value
    assert (value == kind([1, 2])) is False
    assert value != dv.Mirrored([1, 2])
    assert {value: "by identity"}[value] == "by identity"
    assert value in [kind([1, 2]), value]


@both
@pytest.mark.parametrize("other", [3, None, "a", [1, 2], (1, 2), np.ones(2), np.float64(1), object])
def test_equality_with_anything_else_is_refused(kind: Any, other: Any) -> None:
    value = kind([1, 2])
    for compare in (operator.eq, operator.ne):
        for pair in ((value, other), (other, value)):
            with pytest.raises(TypeError, match=r"local_results|\.values\[0\]"):
                compare(*pair)


BINARY = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod,
    operator.pow, operator.matmul, operator.and_, operator.or_, operator.xor, operator.lshift,
    divmod, operator.lt, operator.le, operator.gt, operator.ge,
]  # fmt: skip
UNARY: list[Callable[[Any], Any]] = [
    operator.neg, operator.pos, operator.abs, operator.invert, operator.index, operator.not_,
    float, int, complex, bool, round, iter, list, reversed, math.sqrt,
    np.asarray, np.array, np.sum, np.exp, np.mean, np.sqrt, np.negative,
    lambda x: 1 in x,
    lambda x: [*x],
    lambda x: f"{x:.3f}",
    lambda x: np.concatenate([x, x]),
    lambda x: np.add(x, 1),
    lambda x: np.add(np.ones(2), x),
    lambda x: np.stack([x]),
    lambda x: np.add.reduce(x),
    lambda x: np.dot(x, x),
]  # fmt: skip


@pytest.mark.parametrize("use", BINARY, ids=lambda use: use.__name__)
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
        with pytest.raises(TypeError, match=r"\.values\[0\]"):
            use(dv.Mirrored([held, held]))


def test_no_augmented_assignment() -> None:
    array = np.ones(2)
    value = kept = dv.PerReplica([np.ones(2)] * 2)
    with pytest.raises(TypeError, match=CALLS):
        array += value
    with pytest.raises(TypeError, match=CALLS):
        value += 1
    assert value is kept
    assert array.tolist() == [1.0, 1.0]


def test_a_missing_attribute_names_the_call_to_use() -> None:
    value = dv.PerReplica([np.ones(2), np.ones(2)])
    for name in ("mean", "shape", "item"):
        with pytest.raises(AttributeError, match=r"one value for each replica.*local_results"):
            getattr(value, name)
    assert not hasattr(value, "shape")
    assert f"{value}" == str(value)


def test_copy_to_a_device_is_the_callers(two: dv.Strategy) -> None:
    for value in (
        two.distribute_values_from_function(lambda context: np.full(2, 1.0)),
        dv.PerReplica([np.arange(3)] * 2),
    ):
        copied = value.copy_to("cpu:1")
        assert len(copied) == 2
        for at in range(2):
            assert np.array_equal(copied[at], value[at])
            assert not np.shares_memory(copied[at], value[at])
        assert [str(device) for device in copied.devices] == ["cpu:1", "cpu:1"]
        for nowhere in ("gpu:nowhere", "cuda:77"):
            with pytest.raises(dv.errors.DeviceError, match="cpu:0"):
                value.copy_to(nowhere)


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


@both
def test_a_short_repr_and_a_table_in_notebooks(kind: Any) -> None:
    value = kind([np.zeros((100, 3)), "<script>" + "x" * 500])
    assert len(repr(value)) < 200
    assert kind.__name__ in repr(value)
    assert "float64[100, 3]" in repr(value)
    html = value._repr_html_()
    assert "<table" in html
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert len(re.findall("<tr", html)) == 3


@both
def test_what_holds_no_value_per_replica_is_refused(kind: Any) -> None:
    for values in ("ab", b"ab", {"a": 1}, {1, 2}):
        with pytest.raises(TypeError, match="one per replica"):
            kind(values)
    with pytest.raises(TypeError):
        kind(3)
    with pytest.raises(ValueError, match="got none"):
        kind([])
    with pytest.raises(dv.errors.DeviceError, match="2 values needs 2 devices"):
        kind([1, 2], devices=["cpu:0"])


def test_copies_are_allowed() -> None:
    value = dv.PerReplica([np.ones(2), np.ones(2)])
    assert not np.shares_memory(copy.deepcopy(value)[0], value[0])


def test_values_do_not_communicate(two: dv.Strategy) -> None:
    """Values are created and read in any context, even by a single replica."""

    def alone() -> int:
        if replica() == 0:
            value = dv.PerReplica([1, 2])
            assert repr(value)
            assert dv.Mirrored([3, 3]).values == (3, 3)
            return len(value)
        return 0

    assert two.run(alone).values == (2, 0)
