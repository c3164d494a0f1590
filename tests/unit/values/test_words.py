"""What a nest is, in words: no name of the library that flattens it."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from dvkernels.values.regroup import flatten, in_words, regroup

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
    assert in_words(flatten(nest)[1]) == words


def test_long_words_are_cut():
    words = in_words(flatten({f"a long name {k}": k for k in range(1000)})[1])
    assert len(words) < 250
    assert words.endswith("...")


def test_replicas_that_return_different_nests_are_told_in_words():
    with pytest.raises(
        ValueError, match=r"replica 0 returned a dict of 'x', replica 1 returned a t"
    ):
        regroup([{"x": 1}, (1, 2)], (), object())
