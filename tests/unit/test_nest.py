"""What a nest is, in words: no name of the library that flattens it."""

from __future__ import annotations

import collections

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.nest import words_of
from dvkernels.values.regroup import flatten, regroup

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
def test_nests_are_said_in_words(nest, words):
    assert words_of(flatten(nest)[1]) == words


def test_long_words_are_cut():
    words = words_of(flatten({f"a long name {k}": k for k in range(1000)})[1])
    assert len(words) < 250
    assert words.endswith("...")


def test_replicas_that_return_different_nests_are_told_in_words():
    with pytest.raises(
        ValueError, match=r"replica 0 returned a dict of 'x', replica 1 returned a t"
    ):
        regroup([{"x": 1}, (1, 2)], (), object())


def test_replicas_that_disagree_are_told_in_words():
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
