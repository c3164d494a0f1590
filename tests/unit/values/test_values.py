"""Distributed values: one component per replica, and no arithmetic."""

from __future__ import annotations

import json
import math
import operator

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import DeviceError


@pytest.mark.parametrize("kind", [dv.PerReplica, dv.Mirrored])
def test_holds_its_values_in_order(kind):
    value = kind(["a", "b", "c"])
    assert value.values == ("a", "b", "c")
    assert len(value) == 3
    assert value[1] == value.on(1) == "b"
    assert isinstance(value, dv.DistributedValues)


@pytest.mark.parametrize(
    "operation",
    [
        lambda v: v + 1,
        lambda v: 1 - v,
        lambda v: np.ones(2) * v,
        lambda v: v @ v,
        operator.neg,
        lambda v: v < v,
        float,
        int,
        bool,
        math.sqrt,
        list,
        np.asarray,
        np.sum,
        lambda v: np.add(v, 1),
        lambda v: np.concatenate([v, v]),
        lambda v: 1 in v,
        lambda v: divmod(7, v),
        lambda v: f"{v:.3f}",
        reversed,
        round,
    ],
)
def test_is_not_a_number(operation):
    with pytest.raises(TypeError, match=r"strategy\.reduce.*strategy\.gather.*local_results"):
        operation(dv.PerReplica([1.0, 2.0]))


def test_equality_is_identity():
    value = dv.PerReplica([1, 2])
    assert value == value
    assert value != dv.PerReplica([1, 2])
    assert hash(value) == hash(value)


def test_is_frozen():
    value = dv.PerReplica([1])
    with pytest.raises(AttributeError, match="frozen"):
        value.values = ()
    with pytest.raises(AttributeError, match="frozen"):
        value.extra = 1


@pytest.mark.parametrize("replica", [-1, 2, 10])
def test_an_unknown_replica_id(replica):
    with pytest.raises(IndexError, match="replicas 0 to 1"):
        dv.PerReplica([1, 2]).on(replica)


def test_copy_to_returns_new_arrays():
    array = np.arange(3)
    copied = dv.PerReplica([array, array]).copy_to("cpu:1")
    copied.on(0)[:] = 9
    assert array.tolist() == [0, 1, 2]
    assert copied.on(1).tolist() == [0, 1, 2]
    assert [str(device) for device in copied.devices] == ["cpu:1", "cpu:1"]
    with pytest.raises(DeviceError, match="cpu:0"):
        copied.copy_to("cuda:0")


def test_a_short_repr_and_a_table():
    value = dv.PerReplica([np.zeros((100, 3)), "<b>" + "x" * 500])
    assert len(repr(value)) < 200
    assert "float64[100, 3]" in repr(value)
    assert "&lt;b&gt;" in value._repr_html_()
    assert json.dumps(repr(value))


def test_values_and_devices_must_match_in_number():
    with pytest.raises(ValueError, match="got none"):
        dv.PerReplica([])
    with pytest.raises(DeviceError, match="2 values needs 2 devices"):
        dv.PerReplica([1, 2], devices=["cpu:0"])


@pytest.mark.parametrize("kind", [dv.PerReplica, dv.Mirrored])
@pytest.mark.parametrize("other", [3, None, "a", [1, 2], (1, 2), np.ones(2), np.float64(1), object])
def test_equality_with_anything_else_is_refused(kind, other):
    value = kind([1, 2])
    for compare in (operator.eq, operator.ne):
        for pair in ((value, other), (other, value)):
            with pytest.raises(TypeError, match=r"local_results|\.values\[0\]"):
                compare(*pair)
    assert {value: 1}[value] == 1
    assert value in [dv.PerReplica([1, 2]), value]
    assert value != dv.Mirrored([1, 2])


def test_a_missing_attribute_names_the_call_to_use():
    value = dv.PerReplica([np.ones(2), np.ones(2)])
    for ask in (lambda v: v.mean(), lambda v: v.shape, lambda v: v.item):
        with pytest.raises(AttributeError, match=r"one value for each replica.*local_results"):
            ask(value)
    assert not hasattr(value, "shape")
    assert f"{value}" == str(value)


@pytest.mark.parametrize("kind", [dv.PerReplica, dv.Mirrored])
@pytest.mark.parametrize("values", ["ab", b"ab", {"a": 1}, {1, 2}])
def test_unordered_containers_are_refused(kind, values):
    with pytest.raises(TypeError, match="one per replica"):
        kind(values)
