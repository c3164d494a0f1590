"""Descriptions of pytrees in messages, without names of the library that flattens them."""

from __future__ import annotations

import collections

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.context import UNSCOPED
from dvkernels.pytree import describe_structure, flatten
from dvkernels.values.regroup import regroup

Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(("nest", "words"), [
    (1, "one value"), (None, "one value"), (np.zeros(3), "one value"),
    ((1, 2), "a tuple of 2"), ([1], "a list of 1"), ((), "an empty tuple"), ({}, "an empty dict"),
    ({"x": 1, "y": (2, 3)}, "a dict of 'x', 'y': a tuple of 2"), ({0: 1, 1: 2}, "a dict of 0, 1"),
    ([1, {"a": None}], "a list of (one value, a dict of 'a')"),
    (Point(1, [2]), "a Point of x, y: a list of 1"),
    (collections.OrderedDict(b=1), "an OrderedDict of 'b'"),
    (collections.deque([1]), "a deque of 1"),
])  # fmt: skip
def test_descriptions_of_pytrees(nest, words):
    assert describe_structure(flatten(nest)[1]) == words


def test_long_descriptions_are_truncated():
    words = describe_structure(flatten({f"a long name {k}": k for k in range(1000)})[1])
    assert len(words) < 250
    assert words.endswith("...")


def test_different_returned_structures_are_described():
    with pytest.raises(
        ValueError, match=r"replica 0 returned a dict of 'x', replica 1 returned a t"
    ):
        regroup([{"x": 1}, (1, 2)], (), UNSCOPED)


def test_different_structures_in_a_collective_are_described():
    def step():
        replica = dv.get_replica_context()
        key = "xy"[replica.replica_id_in_sync_group]
        return replica.all_reduce("sum", {key: np.zeros(2)})

    mismatch = dv.errors.CollectiveMismatchError
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy, pytest.raises(mismatch) as caught:
        strategy.run(step)
    said = str(caught.value)
    assert "a dict of 'x'" in said
    assert "a dict of 'y'" in said
    assert "PyTreeSpec" not in said
