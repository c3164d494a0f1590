"""Laws of the collectives over shapes, strides, dtypes, operations and numbers of replicas."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KIND, examples, kernels, smaller

HALVES = (np.dtype("f2"), np.dtype(ml_dtypes.bfloat16))
FLOATS = (*HALVES, np.dtype("f4"), np.dtype("f8"))
COMPLEX = (np.dtype("c8"), np.dtype("c16"))
INTEGERS = tuple(np.dtype(sign + size) for sign in "iu" for size in "1248")
UFUNCS = {
    "sum": np.add,
    "mean": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}
# Each supported pair costs a compilation of 0.4 s, only in the first run of all.
OPS = {
    **{dtype: ("sum", "mean", "prod", "min", "max") for dtype in FLOATS},
    **{dtype: ("sum", "mean", "prod") for dtype in COMPLEX},
    **{dtype: ("sum", "prod", "min", "max") for dtype in INTEGERS},
    np.dtype("?"): ("min", "max"),
}
# Parametrized: draws of Hypothesis from a long list leave many out.
each_dtype = pytest.mark.parametrize("dtype", OPS, ids=str)
each_moved = pytest.mark.parametrize(
    "dtype",
    [*FLOATS[:3], *COMPLEX, *map(np.dtype, ["i1", "?", ">i8", "U3", "M8[s]", "V5"])],
    ids=str,
)
ALGORITHMS = ("auto", "direct", "ring")
GUARD = 24  # elements before and after


class Placed:
    """Array with any strides inside a larger memory, whose rest must stay unwritten."""

    def __init__(self, shape: Any, dtype: Any, order: Any, steps: Any, signs: Any, shift: int):
        dtype = np.dtype(dtype)
        strides, offset, stride = [0] * len(shape), GUARD * dtype.itemsize, dtype.itemsize
        for axis in sorted(range(len(shape)), key=lambda axis: order[axis]):
            strides[axis] = stride * steps[axis]
            stride = strides[axis] * max(shape[axis], 1)
            if signs[axis] < 0:
                offset += strides[axis] * max(shape[axis] - 1, 0)
                strides[axis] *= -1
        self.raw = np.full(stride + 2 * GUARD * dtype.itemsize + shift, 0xA5, np.uint8)
        self.array = np.ndarray(shape, dtype, self.raw, offset + shift, strides)
        self.inside = np.zeros(self.raw.shape, bool)
        marked = (*shape, dtype.itemsize)
        np.ndarray(marked, bool, self.inside, offset + shift, (*strides, 1))[...] = True

    def rest_is_untouched(self) -> bool:
        return bool((self.raw[~self.inside] == 0xA5).all())


@st.composite
def placements(draw: Any, shape: Any, dtype: Any, values: Any = None) -> Placed:
    """C, Fortran, transposed, stepped, reversed, columns of wider ones, unaligned, and mixtures."""
    ndim = len(shape)
    plain = draw(st.booleans())
    order = range(ndim)[::-1] if plain else draw(st.permutations(range(ndim)))
    steps = [1 if plain else draw(st.sampled_from([1, 1, 2, 3])) for _ in shape]
    signs = [1 if plain else draw(st.sampled_from([1, 1, -1])) for _ in shape]
    shift = 0 if draw(st.integers(0, 7)) else 1
    placed = Placed(shape, dtype, order, steps, signs, shift)
    if values is not None:
        placed.array[...] = values
    return placed


MOST_AXES = 3 if KIND == "simulator" else 4
SHAPES = st.one_of(
    st.lists(st.integers(0, 3 if KIND == "simulator" else 6), max_size=MOST_AXES).map(tuple),
    st.integers(0, smaller(300)).map(lambda length: (length,)),
    st.sampled_from([(smaller(4097),), (smaller(65), smaller(127)), (3, 1, smaller(1025))]),
)


def values_for(rng: Any, dtype: Any, op: str, shape: Any) -> Any:
    """Return values whose reduction is exact in any order: in float32, or modulo 2**bits."""
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    if op == "prod":
        of = [1, -1, 1j, 2, 1 + 1j, 0.5] if dtype.kind == "c" else [0, -1, 1, 2, -0.5]
        return rng.choice(of, shape).astype(dtype)
    values = rng.integers(-2000, 2000, shape).astype("f8")
    if dtype.kind == "c":
        return (values + 1j * rng.integers(-2000, 2000, shape)).astype(dtype)
    if op in ("min", "max"):
        values[values % 7 == 0] = np.nan
        values[values % 11 == 0] = np.inf * (1 if op == "min" else -1)
        values[values == 0] = 1  # the order of the two zeros is unspecified
    return values.astype(dtype)


def expected(arrays: list[Any], op: str) -> Any:
    """Reduce left to right in NumPy, the half types in float32 and rounded once."""
    dtype = arrays[0].dtype
    wide = [array.astype("f4") if dtype in HALVES else array for array in arrays]
    with np.errstate(all="ignore"):
        total = np.asarray(functools.reduce(UFUNCS[op], wide))
        if op == "mean":
            parts = total.view(total.real.dtype) if total.ndim and total.size else total
            total = np.asarray(parts / parts.dtype.type(len(arrays))).view(total.dtype)
        return total.astype(dtype)


def assert_is(array: Any, reference: Any, op: str = "") -> None:
    assert (array.dtype, array.shape) == (reference.dtype, reference.shape)
    if op in ("min", "max") or (op == "prod" and array.dtype.kind == "c"):
        # The NaN, and in complex products the sign of zeros, is unspecified.
        wide = "f8" if array.dtype in HALVES else array.dtype
        np.testing.assert_array_equal(array.astype(wide), reference.astype(wide))
    else:
        assert array.tobytes() == reference.tobytes()


def assert_alike(arrays: Any, reference: Any, op: str = "") -> None:
    assert len({array.tobytes() for array in arrays}) == 1
    for array in arrays:
        assert_is(array, reference, op)


def assert_fresh(arrays: Any, inputs: Any) -> None:
    assert all(type(array) is np.ndarray and array.flags.writeable for array in arrays)
    for one, other in itertools.chain(
        itertools.combinations(arrays, 2), itertools.product(arrays, inputs)
    ):
        assert not np.may_share_memory(one, other) or not np.shares_memory(one, other)


@st.composite
def reductions(draw: Any, dtype: Any) -> Any:
    op = draw(st.sampled_from(OPS[dtype]))
    count = draw(st.integers(1, 9))
    if dtype.kind == "c" and op == "mean":
        count = draw(st.sampled_from([1, 2, 4, 8]))  # where both divisions are exact
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(SHAPES)
    return op, [values_for(rng, dtype, op, shape) for _ in range(count)]


@each_dtype
@settings(max_examples=examples(15), deadline=None)
@given(st.data())
def test_all_reduce_is_numpy_on_every_replica(dtype: Any, data: Any) -> None:
    op, values = data.draw(reductions(dtype))
    reference = expected(values, op)
    like = (reference.shape, reference.dtype)
    for algorithm in ALGORITHMS:
        buffers = [data.draw(placements(*like, value)) for value in values]
        out = [data.draw(placements(*like)) for _ in values]
        arrays, out_arrays = ([placed.array for placed in group] for group in (buffers, out))

        results = kernels.all_reduce(arrays, op, algorithm=algorithm, out=out_arrays)
        assert [id(result) for result in results] == [id(array) for array in out_arrays]
        assert_alike(out_arrays, reference, op)
        for array, value in zip(arrays, values, strict=True):
            assert array.tobytes() == value.tobytes()

        chosen = arrays if data.draw(st.booleans()) else None  # out may be the buffers
        results = kernels.all_reduce(arrays, op, algorithm=algorithm, out=chosen)
        assert [id(result) for result in results] == [id(array) for array in arrays]
        assert_alike(arrays, reference, op)
        assert all(placed.rest_is_untouched() for placed in [*buffers, *out])


@each_dtype
@settings(max_examples=examples(12), deadline=None)
@given(st.data())
def test_reduce_and_reduce_scatter_then_all_gather(dtype: Any, data: Any) -> None:
    op, values = data.draw(reductions(dtype))
    if values[0].ndim and values[0].size and data.draw(st.booleans()):
        arrays = [np.broadcast_to(value[:1], value.shape) for value in values]
        values = [array.copy() for array in arrays]
    else:
        arrays = [data.draw(placements(value.shape, value.dtype, value)).array for value in values]
        for array in arrays:
            array.flags.writeable = False
    reference = expected(values, op)

    one = kernels.reduce(arrays, op)
    assert_is(one, reference, op)
    assert_fresh([one], arrays)
    into = data.draw(placements(reference.shape, reference.dtype))
    assert kernels.reduce(arrays, op, out=into.array) is into.array
    assert_is(into.array, reference, op)
    assert into.rest_is_untouched()
    named = {"sum": kernels.aggregate_sum, "mean": kernels.aggregate_mean}
    if op in named:
        assert_is(named[op](arrays), reference, op)
        assert named[op](arrays, out=into.array) is into.array

    if reference.ndim:
        parts = np.array_split(reference, len(arrays))
        scattered = kernels.reduce_scatter(arrays, op)
        assert_fresh(scattered, arrays)
        out = [data.draw(placements(part.shape, part.dtype)) for part in parts]
        out_arrays = [placed.array for placed in out]
        results = kernels.reduce_scatter(arrays, op, out=out_arrays)
        assert [id(result) for result in results] == [id(array) for array in out_arrays]
        assert all(placed.rest_is_untouched() for placed in out)
        for part, first, second in zip(parts, scattered, out_arrays, strict=True):
            assert_is(first, part, op)
            assert_is(second, part, op)
        assert_alike(kernels.all_gather(out_arrays), reference, op)
    for array, value in zip(arrays, values, strict=True):
        assert array.tobytes() == value.tobytes()


@settings(max_examples=examples(60), deadline=None)
@given(
    st.sampled_from(["sum", "min", "prod"]),
    st.integers(1, 6),
    st.lists(
        st.tuples(st.sampled_from([HALVES[0], *FLOATS[2:], INTEGERS[0], INTEGERS[7]]), SHAPES),
        max_size=6,
    ),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_many_arrays_are_each_reduced(
    op: str, count: int, arrays: Any, seed: int, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    values = [[values_for(rng, dtype, op, shape) for _ in range(count)] for dtype, shape in arrays]
    placed = [
        [data.draw(placements(value.shape, value.dtype, value)) for value in group]
        for group in values
    ]
    groups = [[one.array for one in group] for group in placed]
    results = kernels.all_reduce_many(groups, op)
    assert [[id(one) for one in group] for group in results] == [
        [id(one) for one in group] for group in groups
    ]
    for group, value in zip(groups, values, strict=True):
        assert_alike(group, expected(value, op), op)
    assert all(one.rest_is_untouched() for group in placed for one in group)


def noise(rng: Any, dtype: Any, shape: Any) -> Any:
    """Return random bytes as values of the dtype."""
    if dtype.kind in "bU":
        return rng.integers(0, 2, shape).astype(dtype)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return np.ndarray(shape, dtype, raw)


def joined(arrays: Any, axis: int = 0) -> Any:
    """Concatenate, and keep a foreign byte order, which NumPy makes native."""
    return np.concatenate(arrays, axis).astype(arrays[0].dtype)


@each_moved
@settings(max_examples=examples(15), deadline=None)
@given(st.integers(1, 9), SHAPES, st.integers(0, 2**32 - 1), st.data())
def test_broadcast_and_all_to_all_copy_all_bytes(
    dtype: Any, count: int, shape: Any, seed: int, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    values = [noise(rng, dtype, shape) for _ in range(count)]
    placed = [data.draw(placements(shape, dtype, value)) for value in values]
    arrays = [one.array for one in placed]

    if shape:
        parts = [np.array_split(value, count) for value in values]
        exchanged = [joined([of[i] for of in parts]) for i in range(count)]
        results = kernels.all_to_all(arrays)
        assert_fresh(results, arrays)
        out = [data.draw(placements(one.shape, dtype)) for one in exchanged]
        into = kernels.all_to_all(arrays, out=[one.array for one in out])
        assert [id(one) for one in into] == [id(one.array) for one in out]
        for result, second, reference in zip(results, into, exchanged, strict=True):
            assert_is(result, reference)
            assert_is(second, reference)
        assert all(one.rest_is_untouched() for one in [*out, *placed])
    for array, value in zip(arrays, values, strict=True):
        assert array.tobytes() == value.tobytes()

    root = data.draw(st.integers(0, count - 1))
    results = kernels.broadcast(arrays, root)
    assert [id(result) for result in results] == [id(array) for array in arrays]
    assert_alike(arrays, values[root])
    assert all(one.rest_is_untouched() for one in placed)


@each_moved
@settings(max_examples=examples(15), deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=MOST_AXES),
    st.lists(st.integers(0, smaller(40)), min_size=1, max_size=9),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_all_gather_joins_along_any_axis(
    dtype: Any, shape: Any, lengths: Any, seed: int, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    values = []
    for length in lengths:
        shape[axis] = length
        values.append(noise(rng, dtype, tuple(shape)))
    arrays = [data.draw(placements(value.shape, dtype, value)).array for value in values]
    for array in arrays:
        array.flags.writeable = False
    reference = joined(values, axis)
    results = kernels.all_gather(arrays, axis)
    assert_alike(results, reference)
    assert_fresh(results, arrays)
    out = [data.draw(placements(reference.shape, dtype)) for _ in lengths]
    into = kernels.all_gather(arrays, axis, out=[one.array for one in out])
    assert [id(one) for one in into] == [id(one.array) for one in out]
    assert_alike(into, reference)
    assert all(one.rest_is_untouched() for one in out)
    for array, value in zip(arrays, values, strict=True):
        assert array.tobytes() == value.tobytes()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(max_examples=examples(25), deadline=None)
@given(st.integers(1, 9), st.integers(0, smaller(300)), st.integers(0, 2**32 - 1))
def test_rounding_sums_keep_an_order(dtype: Any, count: int, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [
        (rng.standard_normal(length) * 4.0 ** rng.integers(-4, 5, length)).astype(dtype)
        for _ in range(count)
    ]
    for op in ("sum", "mean"):  # direct and many: left to right, as documented
        direct, many = ([value.copy() for value in values] for _ in range(2))
        assert_alike(kernels.direct_all_reduce(direct, op), expected(values, op))
        kernels.all_reduce_many([many], op)
        assert_alike(many, expected(values, op))
    three = [values[k % count] for k in range(3)]  # the ring: some order, rounded once
    ring = [value.copy() for value in three]
    kernels.ring_all_reduce(ring)
    assert len({array.tobytes() for array in ring}) == 1
    orders = [
        expected([three[k] for k in order], "sum") for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    ]
    assert np.any([ring[0].astype("f8") == order.astype("f8") for order in orders], axis=0).all()
