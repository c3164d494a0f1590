"""A batch equals ``np.stack`` of its rows, or is refused; no value changes."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import optree
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.stacking import stack
from dvkernels.errors import DatasetError

Point = collections.namedtuple("Point", "x y")

VALUES = [
    3, -1, 2**62, 2**63, True, 1.5, float("nan"), 2j, "a", "longer", b"ab", np.int8(3),
    np.uint8(200), np.int16(-4), np.uint64(2**63), np.float16(0.1), np.float32(0.1),
    np.float64(0.1), np.bool_(True), np.datetime64("2020"), np.datetime64("2020-05-01T12"),
    np.timedelta64(3, "s"), np.array(3.0), np.array(3, ">i4"),
    ml_dtypes.bfloat16(1.5), np.str_("text"),
]  # fmt: skip


PAIRS = [*itertools.combinations_with_replacement(VALUES, 2)]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_batch_is_what_numpy_stacks(one: Any, other: Any) -> None:
    rows = [one, other, one]
    try:
        wanted = np.stack([np.asarray(row) for row in rows])
    except Exception as error:
        with pytest.raises(type(error)):
            stack(rows, 3)
        return
    kinds = {np.asarray(row).dtype.kind for row in rows}
    if (wanted.dtype.kind in "SU" and not kinds <= {"S", "U"}) or (
        wanted.dtype.kind == "f" and kinds <= {"i", "u"}
    ):  # NumPy's result would change the values
        with pytest.raises(DatasetError, match="that one dtype holds as they are"):
            stack(rows, 3)
        return
    got = stack(iter(rows), 3)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i4", "f2", "f4", "c8", "?", "M8[D]", "U3"])
@pytest.mark.parametrize("make", [
    lambda rows: Dataset.from_sequence(list(rows)),
    lambda rows: Dataset.from_iterable(lambda: iter(rows)),
    lambda rows: Dataset.from_arrays(rows),
])  # fmt: skip
def test_rows_of_one_dtype_keep_it(make: Any, dtype: str) -> None:
    rows = np.arange(12).reshape(6, 2).astype(dtype)
    batches = list(make(rows).batch(4))
    assert [len(batch) for batch in batches] == [4, 2]
    assert {batch.dtype.newbyteorder("=") for batch in batches} == {rows.dtype.newbyteorder("=")}
    np.testing.assert_array_equal(np.concatenate(batches), rows)


@pytest.mark.parametrize("nest", [
    1, (1, 2.0), [1, {"b": 2, "a": (3, "x")}], Point(np.zeros(2), [1]), {3: 1, 2: 2},
    collections.OrderedDict(b=1, a=np.zeros((2, 0))), (), {},
])  # fmt: skip
def test_nests_keep_their_structure(nest: Any) -> None:
    batch = stack([nest, nest], 2)
    rows = [optree.tree_map(lambda leaf, k=k: leaf[k], batch) for k in range(2)]
    assert optree.tree_structure(rows[0]) == optree.tree_structure(nest)
    for row in rows:
        for got, wanted in zip(optree.tree_leaves(row), optree.tree_leaves(nest), strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("rows", "said"), [
    ([{"x": 1}, {"y": 1}], "a dict of 'x' for its element 0 and a dict of 'y' for its element 1"),
    ([(1, 2), (1, 2, 3)], "a tuple of 2 for its element 0 and a tuple of 3 for its element 1"),
    ([(1, 2), [1, 2]], "a tuple of 2 .* a list of 2"),
    ([1, (1,)], "one value .* a tuple of 1"),
    ([Point(1, {"a": 1}), Point(1, 2)], r"a Point of x, y: a dict of 'a' .* a Point of x, y "),
    ([(1, {"a": []}), ()], r"a tuple of \(one value, a dict of 'a': an empty list\) .* an empty"),
    ([np.zeros(2), np.zeros(3)], r"\(2,\) for element of element 0 .* \(3,\)"),
    ([None, None], "a NoneType, as element"),
    ([{"x": 1}, {"x": object()}], r"as element\['x'\] of element 1"),
    ([b"ab\0", b"abc"], "drop zeros"),
    ([b"abc", b"ab\0"], "drop zeros"),
    (["a\0"], "drop zeros"),
    ([2**64], "2\\*\\*|18446744073709551616"),
    ([np.ma.array([1, 2], mask=[0, 1])], "MaskedArray, whose mask would be ignored"),
    ([(1, np.ma.masked)], r"MaskedConstant.*element\[1\]|element\[1\].*MaskedConstant"),
])  # fmt: skip
def test_rows_that_cannot_be_stacked_are_refused(rows: list[Any], said: str) -> None:
    with pytest.raises(DatasetError, match=said) as raised:
        stack(rows, len(rows))
    assert "PyTreeSpec" not in str(raised.value)


def test_a_batch_takes_the_memory_that_its_elements_need() -> None:
    (batch,) = Dataset.from_iterable(lambda: iter(range(1000))).batch(2**60)
    assert batch.tolist() == list(range(1000))
    assert batch.nbytes == batch.base.nbytes if batch.base is not None else True
    rows = [np.full(2**20, k) for k in range(20)]  # more than is allocated at first
    (large,) = Dataset.from_iterable(lambda: iter(rows)).batch(2**60)
    assert large[:, 0].tolist() == list(range(20))
    assert large.shape == (20, 2**20)


def test_pytorch_tensors_with_gradients_and_bfloat16_can_be_stacked() -> None:
    torch = pytest.importorskip("torch")
    half = torch.tensor([1.5, 2.0], dtype=torch.bfloat16)
    grown = torch.ones(2, requires_grad=True)
    halves, ones = stack([(half, grown), (half, grown)], 2)
    assert halves.dtype == ml_dtypes.bfloat16
    assert ones.tolist() == [[1, 1], [1, 1]]
