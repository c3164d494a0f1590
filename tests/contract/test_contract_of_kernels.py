"""Contract of the kernels: values, errors, bits, threads, forks."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import textwrap
import threading
import time
import warnings
from typing import Any

import fork_server
import ml_dtypes
import numpy as np
import pytest
from kinds import kernels, only_cpu
from numpy.lib.stride_tricks import as_strided

import dvkernels as dv
from dvkernels import errors

BF16 = np.dtype(ml_dtypes.bfloat16)
HALVES = [np.dtype("f2"), BF16]
UFUNCS = {
    "sum": np.add,
    "mean": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}
PAIRS = [
    *[(dtype, op) for dtype in [*HALVES, "f4", "f8"] for op in UFUNCS],
    *[(dtype, op) for dtype in ("c8", "c16") for op in ("sum", "mean", "prod")],
    *[(s + n, op) for s in "iu" for n in "1248" for op in ("sum", "prod", "min", "max")],
    *[("?", op) for op in ("min", "max")],
]
BUILTINS = {
    errors.BufferMismatchError: ValueError,
    errors.NotABufferError: TypeError,
    errors.UnsupportedDTypeError: TypeError,
    errors.ReduceOpError: ValueError,
    errors.AlgorithmError: ValueError,
}
REPLICAS = 3
LENGTH = 7


def _many(buffers: Any, op: Any = "sum") -> Any:
    return kernels.all_reduce_many([buffers], op)[0]


ALL_REDUCERS = {
    "auto": kernels.all_reduce,
    "direct": functools.partial(kernels.all_reduce, algorithm="direct"),
    "ring": functools.partial(kernels.all_reduce, algorithm="ring"),
    "direct_all_reduce": kernels.direct_all_reduce,
    "ring_all_reduce": kernels.ring_all_reduce,
    "many": _many,
}
REDUCERS = {
    **ALL_REDUCERS,
    "reduce": kernels.reduce,
    "reduce_scatter": kernels.reduce_scatter,
}
IN_PLACE = {**ALL_REDUCERS, "broadcast": kernels.broadcast}
MOVERS = {
    "broadcast": kernels.broadcast,
    "all_gather": kernels.all_gather,
    "all_to_all": kernels.all_to_all,
}
NEEDS_AXIS = {
    "reduce_scatter": kernels.reduce_scatter,
    "all_gather": kernels.all_gather,
    "all_to_all": kernels.all_to_all,
}
FUNCTIONS = {
    **REDUCERS,
    **MOVERS,
    "aggregate_sum": kernels.aggregate_sum,
    "aggregate_mean": kernels.aggregate_mean,
}
WITH_OUT = [*[name for name in ALL_REDUCERS if name != "many"], *NEEDS_AXIS]


def each(functions: Any) -> Any:
    return pytest.mark.parametrize("name", list(functions))


def fresh(count: int = REPLICAS, dtype: Any = "f4", shape: Any = LENGTH) -> list[Any]:
    size = int(np.prod(shape))
    return [
        (np.arange(size) % 5 + 2 * replica + 1).astype(dtype).reshape(shape)
        for replica in range(count)
    ]


def arrays_in(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, (list, tuple)):
        return [array for part in value for array in arrays_in(part)]
    return []


def refused(
    error: type[Exception], match: str | None, call: Any, *values: Any, **named: Any
) -> None:
    """Check the error, its bases and that no array among the arguments changed."""
    arrays = arrays_in([*values, *named.values()])
    before = [array.tobytes() for array in arrays if array.dtype != object]
    with pytest.raises(error, match=match) as caught:
        call(*values, **named)
    assert type(caught.value) is error
    assert issubclass(error, errors.DvKernelsError)
    assert issubclass(error, BUILTINS[error])
    assert [array.tobytes() for array in arrays if array.dtype != object] == before


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


# ---------------------------------------------------------------- values


def reference(buffers: list[Any], op: str) -> Any:
    """Reduce left to right in NumPy, the half types in float32 and rounded once."""
    dtype = buffers[0].dtype
    with np.errstate(all="ignore"):
        wide = [b.astype("f4") if dtype in HALVES else b for b in buffers]
        total = functools.reduce(UFUNCS[op], wide)
        if op == "mean":
            total = total / total.dtype.type(len(buffers))
        return np.asarray(total).astype(dtype)


def doubles(array: Any) -> Any:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return array.astype("f8")


@pytest.mark.parametrize(("dtype", "op"), PAIRS, ids=str)
def test_every_dtype_and_op_in_every_function(dtype: Any, op: str) -> None:
    dtype, rng = np.dtype(dtype), np.random.default_rng(3)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        values = rng.integers(info.min, info.max, (4, 61), dtype, endpoint=True)
    else:
        values = rng.integers(-2, 3, (4, 61)).astype(dtype)
    expected = reference(list(values), op).tolist()
    for name, function in REDUCERS.items():
        buffers = [value.copy() for value in values]
        result = function(buffers, op)
        if name == "reduce":
            assert result.tolist() == expected
        elif name == "reduce_scatter":
            assert np.concatenate(result).tolist() == expected
        else:
            assert {buffer.tobytes() for buffer in buffers} == {result[0].tobytes()}
            assert result[0].tolist() == expected


@pytest.mark.parametrize(
    ("dtype", "op", "values", "expected"),
    [
        ("f2", "sum", [2048, 1, 1], 2050),
        ("f2", "sum", [60000, 60000, -60000], 60000),
        ("f2", "mean", [2048, 1, 1], 683.5),
        ("f2", "prod", [40000, 2, 0.5], 40000),
        ("f2", "sum", [2**-24, 2**-24, 2**-24], 3 * 2**-24),
        (BF16, "sum", [256, 1, 1], 258),
        (BF16, "mean", [256, 1, 1], 86),
        (BF16, "sum", [2.0**-133, 2.0**-133, 2.0**-133], 3 * 2.0**-133),
        ("f4", "sum", [1e-45, 1e-45, 1e-45], 3 * float(np.float32(1e-45))),
        ("f8", "sum", [5e-324, 5e-324, 5e-324], 1.5e-323),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2, 300])
def test_one_rounding_at_the_end(
    dtype: Any, op: str, values: Any, expected: float, length: int
) -> None:
    for turn in range(3):
        turned = values[turn:] + values[:turn]
        for name, function in REDUCERS.items():
            results = function([np.full(length, value, dtype) for value in turned], op)
            for result in [results] if name == "reduce" else results:
                assert (result.astype("f8") == np.float64(np.asarray(expected, dtype))).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", UFUNCS)
def test_all_bit_patterns_of_the_half_types(dtype: Any, op: str) -> None:
    every = np.arange(2**16, dtype="u2")
    left, right = every.view(dtype), np.random.default_rng(5).permutation(every).view(dtype)
    expected = doubles(reference([left, right], op))
    for function in (kernels.direct_all_reduce, kernels.ring_all_reduce):
        pair = [left.copy(), right.copy()]
        function(pair, op)
        assert pair[0].tobytes() == pair[1].tobytes()
        np.testing.assert_array_equal(doubles(pair[0]), expected)
    alone = kernels.reduce([left], op)
    np.testing.assert_array_equal(doubles(alone), doubles(left))


@pytest.mark.parametrize("dtype", [*HALVES, "f4", "f8"], ids=str)
@pytest.mark.parametrize("length", [1, 97])
def test_nan_propagates_and_infinities_follow_ieee(dtype: Any, length: int) -> None:
    for name, function in REDUCERS.items():
        for op in UFUNCS:
            for place in range(REPLICAS):
                buffers = [np.full(length, value, dtype) for value in (1, -2, 3)]
                buffers[place][-1] = np.nan
                result = function(buffers, op)
                last = result if name == "reduce" else np.concatenate(result)
                assert np.isnan(last[-1])
                others = last[: length - 1]
                assert not np.isnan(others).any()
        against = function([np.full(length, value, dtype) for value in (np.inf, 1, -np.inf)])
        assert np.isnan(np.asarray(against[0], "f8")).all()
        zeros = function([np.full(length, -0.0, dtype) for _ in range(REPLICAS)])
        assert np.signbit(np.asarray(zeros[0], "f8")).all()


@pytest.mark.parametrize("op", [dv.ReduceOp.MAX, "max", "MAX", "Max"])
def test_an_op_by_any_name(op: Any) -> None:
    for function in (kernels.all_reduce, kernels.direct_all_reduce, kernels.ring_all_reduce, _many):
        assert function(fresh(), op)[0].tolist() == np.max(fresh(), 0).tolist()
    assert kernels.reduce(fresh(), op).tolist() == np.max(fresh(), 0).tolist()


@each(FUNCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 3), (1, 2, 1, 3, 1, 2, 1)], ids=str)
def test_tuples_numpy_integers_and_any_shape(name: str, shape: Any) -> None:
    if shape == () and name in NEEDS_AXIS:
        return
    from_list, from_tuple = (
        FUNCTIONS[name](fresh(shape=shape)),
        FUNCTIONS[name](tuple(fresh(shape=shape))),
    )
    for one, other in zip(arrays_in(from_list), arrays_in(from_tuple), strict=True):
        assert (one.shape, one.tobytes()) == (other.shape, other.tobytes())
    assert (
        kernels.broadcast(fresh(shape=shape), np.int64(2))[0].tolist()
        == fresh(shape=shape)[2].tolist()
    )
    if shape:
        assert kernels.all_gather(fresh(shape=shape), np.int8(-1))[0].shape[-1] == 3 * shape[-1]


@each(FUNCTIONS)
def test_an_iterator_of_buffers_is_consumed_or_refused(name: str) -> None:
    buffers, twin = fresh(), fresh()
    before = [buffer.tobytes() for buffer in buffers]
    try:
        results = arrays_in(FUNCTIONS[name](buffer for buffer in buffers))
    except errors.NotABufferError:
        assert [buffer.tobytes() for buffer in buffers] == before
    else:
        expected = arrays_in(FUNCTIONS[name](twin))
        assert [one.tobytes() for one in results] == [one.tobytes() for one in expected]


@pytest.mark.parametrize("name", WITH_OUT)
def test_an_iterator_as_out_is_consumed_or_refused(name: str) -> None:
    buffers = fresh()
    expected = FUNCTIONS[name](fresh())
    out = [np.empty_like(one) for one in expected]
    try:
        results = FUNCTIONS[name](buffers, out=(one for one in out))
    except errors.NotABufferError:
        return
    assert [id(one) for one in results] == [id(one) for one in out]
    assert [one.tobytes() for one in out] == [one.tobytes() for one in expected]


def test_empty_arrays_share_no_element() -> None:
    empty = np.empty(0, "f4")
    assert kernels.all_reduce([empty, empty])[1] is empty
    assert kernels.all_reduce_many([]) == []


@each(["reduce", "aggregate_sum", "aggregate_mean", *NEEDS_AXIS])
@pytest.mark.parametrize("count", [1, 3])
def test_new_arrays_are_new_even_for_one_replica(name: str, count: int) -> None:
    buffers = [read_only(buffer) for buffer in fresh(count)]
    results = arrays_in(FUNCTIONS[name](buffers))
    before = [buffer.tobytes() for buffer in buffers]
    for result in results:
        result[...] = 0
    assert [buffer.tobytes() for buffer in buffers] == before
    for number, result in enumerate(results):
        result[...] = number
    assert all((result == number).all() for number, result in enumerate(results))


# ---------------------------------------------------------------- errors


@each(FUNCTIONS)
@pytest.mark.parametrize("count", [1, 3])
def test_objects_that_are_not_buffers(name: str, count: int) -> None:
    function, last = FUNCTIONS[name], rf"replica {count - 1}\b"
    for wrong in ([1.0] * LENGTH, 1.0, None, "text", np.float32(1), np.ma.ones(LENGTH, "f4")):
        buffers = [*fresh(count - 1), wrong]
        refused(errors.NotABufferError, last, function, buffers)
        if name != "many":
            refused(errors.NotABufferError, "replica 0", function, [[1.0, 2.0]] * count)
    if name != "many":
        refused(errors.BufferMismatchError, "at least one", function, [])
        refused(errors.BufferMismatchError, "at least one", function, ())
        for wrong in (None, 3):
            refused(errors.NotABufferError, "sequence", function, wrong)


@each(FUNCTIONS)
def test_buffers_that_differ(name: str) -> None:
    function = FUNCTIONS[name]
    two = [np.ones((4, 3), "f4"), np.ones((4, 3), "f4")]
    for wrong in ([2, 2], (4, 3, 1), (12,), ()):
        refused(errors.BufferMismatchError, "replica 2", function, [*two, np.ones(wrong, "f4")])
    for wrong in ("f8", "i4", "f2", BF16, ">f4", "c8"):
        refused(errors.BufferMismatchError, "replica 2", function, [*two, np.ones((4, 3), wrong)])
    if name != "all_gather":
        refused(errors.BufferMismatchError, "replica 1", function, [two[0], np.ones((3, 3), "f4")])
        refused(errors.BufferMismatchError, "replica 1", function, [two[0], np.ones((0, 3), "f4")])


@each(REDUCERS)
@pytest.mark.parametrize("length", [LENGTH, 0])
def test_ops_that_are_not_defined_for_a_dtype(name: str, length: int) -> None:
    function = REDUCERS[name]
    for op in ("median", "", None, 3, ["sum"], np.add, "sum "):
        refused(errors.ReduceOpError, "'sum'.*'prod'", function, fresh(shape=length), op)
    pairs = [
        *[("mean", s + n) for s in "iu" for n in "1248"],
        *[(op, dtype) for op in ("min", "max") for dtype in ("c8", "c16")],
        *[(op, "?") for op in ("sum", "prod", "mean")],
        *[(op, dtype) for op in ("sum", "max") for dtype in (">f4", ">i2", "O", "U2", "S2", "V4")],
        *[("sum", dtype) for dtype in ("M8[s]", "m8[s]", "g", "i4,f4", ml_dtypes.float8_e5m2)],
    ]
    for op, dtype in pairs:
        buffers = [np.zeros(length, dtype) for _ in range(2)]
        refused(errors.UnsupportedDTypeError, None, function, buffers, op)


def test_aggregates_and_moves_refuse_dtypes() -> None:
    refused(errors.UnsupportedDTypeError, "int32", kernels.aggregate_mean, fresh(dtype="i4"))
    refused(errors.UnsupportedDTypeError, "bool", kernels.aggregate_sum, fresh(dtype="?"))
    for function in MOVERS.values():
        objects = [np.array([None, 1]) for _ in range(2)]
        refused(errors.UnsupportedDTypeError, "object", function, objects)
        holding = [np.zeros(2, [("a", "i4"), ("b", "O")]) for _ in range(2)]
        refused(errors.UnsupportedDTypeError, None, function, holding)


@pytest.mark.parametrize("algorithm", ["tree", "", None, 1, ["ring"], b"ring"])
def test_an_unknown_algorithm(algorithm: Any) -> None:
    for length in (0, LENGTH):
        call = functools.partial(kernels.all_reduce, algorithm=algorithm)
        refused(errors.AlgorithmError, "'auto', 'direct', 'ring'", call, fresh(shape=length))


@pytest.mark.parametrize("root", [-1, 3, True, False, 0.0, None, "0", np.bool_(True), 2**70])
def test_a_root_that_is_no_replica(root: Any) -> None:
    call = functools.partial(kernels.broadcast, root=root)
    refused(errors.BufferMismatchError, "root", call, fresh())


@pytest.mark.parametrize("axis", [2, -3, True, 0.0, None, "0", 2**70])
def test_an_axis_that_the_buffers_lack(axis: Any) -> None:
    call = functools.partial(kernels.all_gather, axis=axis)
    refused(errors.BufferMismatchError, "axis", call, fresh(shape=(2, 3)))


@each(NEEDS_AXIS)
def test_scalars_have_no_axis(name: str) -> None:
    refused(errors.BufferMismatchError, "axis", NEEDS_AXIS[name], fresh(shape=()))


@each(IN_PLACE)
def test_buffers_that_cannot_be_written(name: str) -> None:
    function, base = IN_PLACE[name], np.arange(24, dtype="f4")
    for place in range(REPLICAS):
        buffers = fresh()
        buffers[place].flags.writeable = False
        refused(errors.BufferMismatchError, f"replica {place}.*read-only", function, buffers)
    same = [base[:5], np.ones(5, "f4")]
    for overlapping in (
        [*same, base[:5]],
        [*same, base[4:9]],
        [*same, base[4::-1]],
        [*same, base[:10:2]],
        [*same, base[2:22:4]],
        [np.ones(5, "f4"), np.ones(5, "f4"), as_strided(base, (5,), (0,))],
        [np.ones((2, 5), "f4"), np.ones((2, 5), "f4"), as_strided(base, (2, 5), (4, 4))],
    ):
        refused(errors.BufferMismatchError, "replica 2", function, overlapping)
    interleaved = np.zeros(15, "f4")  # shares memory, and no element
    function([interleaved[k::3] for k in range(3)])


@pytest.mark.parametrize("name", WITH_OUT)
def test_an_out_that_does_not_fit(name: str) -> None:
    function = FUNCTIONS[name]
    shapes = [one.shape for one in function(fresh())]

    def out() -> list[Any]:
        return [np.full(shape, 9, "f4") for shape in shapes]

    for wrong in (out()[:-1], [*out(), np.ones(3, "f4")]):
        refused(errors.BufferMismatchError, r"\bout\b", function, fresh(), out=wrong)
    for wrong in (3, [1.0, 2.0, 3.0], [*out()[:2], None], [*out()[:2], [1.0] * 7]):
        refused(errors.NotABufferError, None, function, fresh(), out=wrong)
    refused(
        errors.NotABufferError, "out 2", function, fresh(), out=[*out()[:2], np.ma.ones(shapes[2])]
    )
    last = shapes[2][0]
    backing = np.full(3 * LENGTH * 2, 9, "f4")
    for wrong in (
        np.ones(last + 1, "f4"),
        np.ones((last, 1), "f4"),
        np.ones((), "f4"),
        np.ones(last, "f8"),
        np.ones(last, ">f4"),
        np.ones(last, "i4"),
        read_only(np.ones(last, "f4")),
        as_strided(backing, (last,), (0,)),
    ):
        wrong_out = [*out()[:2], wrong]
        refused(errors.BufferMismatchError, "out 2", function, fresh(), out=wrong_out)
    first, second = shapes[0][0], shapes[1][0]
    shared = [backing[:first], backing[first - 1 : first - 1 + second], out()[2]]
    refused(errors.BufferMismatchError, "out 0.*out 1|out 1.*out 0", function, fresh(), out=shared)
    memory = np.arange(40, dtype="f4")  # inputs and out share one element, or all of another's
    inputs = [memory[:LENGTH], *fresh()[1:]]
    partly = [out()[0], memory[LENGTH - 1 : LENGTH - 1 + second], out()[2]]
    refused(errors.BufferMismatchError, "out 1", function, inputs, out=partly)
    if shapes[0] == (LENGTH,):
        crossed = [out()[0], inputs[0], out()[2]]
        refused(errors.BufferMismatchError, "out 1", function, inputs, out=crossed)
        reversed_ = [inputs[0][::-1], out()[1], out()[2]]
        refused(errors.BufferMismatchError, "out 0", function, inputs, out=reversed_)


@pytest.mark.parametrize("name", WITH_OUT)
def test_an_empty_out(name: str) -> None:
    refused(errors.BufferMismatchError, r"\bout\b", FUNCTIONS[name], fresh(), out=[])


def test_an_out_of_reduce_that_does_not_fit() -> None:
    buffers = fresh()
    for function in (kernels.reduce, kernels.aggregate_sum, kernels.aggregate_mean):
        for wrong in ([np.ones(LENGTH, "f4")], 3, np.ma.ones(LENGTH, "f4")):
            refused(errors.NotABufferError, "out", function, buffers, out=wrong)
        for wrong in (
            np.ones(LENGTH + 1, "f4"),
            np.ones((1, LENGTH), "f4"),
            np.ones(LENGTH),
            read_only(np.ones(LENGTH, "f4")),
            as_strided(np.ones(1, "f4"), (LENGTH,), (0,)),
            buffers[1][::-1],
        ):
            refused(errors.BufferMismatchError, "out", function, buffers, out=wrong)
    sums = np.sum(fresh(), 0).tolist()
    for place in range(REPLICAS):  # the very array of a replica is no partial overlap
        buffers = fresh()
        with contextlib.suppress(errors.BufferMismatchError):
            assert kernels.reduce(buffers, out=buffers[place]).tolist() == sums


def test_all_reduce_many_touches_no_array_if_one_is_refused() -> None:
    call = kernels.all_reduce_many
    good = [fresh(), fresh(dtype="i4"), fresh(shape=(2, 3))]
    view = np.arange(30, dtype="f4")
    cases: list[tuple[Any, str | None, Any]] = [
        (errors.BufferMismatchError, "array 3", fresh(2)),
        (errors.BufferMismatchError, "array 3", fresh(4)),
        (errors.BufferMismatchError, "array 3", []),
        (errors.BufferMismatchError, "array 3.*replica 2", [*fresh(2), np.ones(8, "f4")]),
        (errors.BufferMismatchError, "array 3.*replica 2", [*fresh(2), np.ones(7)]),
        (
            errors.BufferMismatchError,
            "array 3.*replica 1",
            [np.ones(3), read_only(np.ones(3)), np.ones(3)],
        ),
        (errors.BufferMismatchError, "replica 0", [good[0][0], *fresh(2)]),
        (
            errors.BufferMismatchError,
            "replica 1",
            [np.ones(6, "f4"), good[2][2].reshape(6), np.ones(6, "f4")],
        ),
        (errors.BufferMismatchError, "replica 2", [view[:9], view[9:18], view[17:26]]),
        (errors.NotABufferError, "array 3.*replica 2", [*fresh(2), [1.0] * 7]),
        (errors.NotABufferError, "array 3.*replica 2", [*fresh(2), np.ma.ones(7, "f4")]),
        (errors.NotABufferError, None, 5),
        (errors.NotABufferError, None, None),
        (errors.UnsupportedDTypeError, "array 3", fresh(dtype="?")),
        (errors.UnsupportedDTypeError, "array 3", fresh(dtype=">f4")),
        (errors.UnsupportedDTypeError, "array 3", fresh(dtype="O")),
    ]
    for error, match, last in cases:
        refused(error, match, call, [*good, last])
    refused(errors.UnsupportedDTypeError, "array 1.*int32", call, good, "mean")
    refused(errors.ReduceOpError, "'sum'", call, good, "median")
    refused(errors.BufferMismatchError, "at least one", call, [[], []])
    for wrong in (None, 5, [5], [None, good[0]], [1.0, 2.0]):
        refused(errors.NotABufferError, None, call, wrong)
    assert arrays_in(call(tuple(tuple(group) for group in good)))[0] is good[0][0]
    assert good[0][2].tolist() == np.sum(fresh(), 0).tolist()


# ---------------------------------------------------------------- bits, threads, processes

_DIGESTS = """
    import hashlib
    import ml_dtypes
    import numpy as np
    from dvkernels import kernels

    def digest(arrays):
        return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()

    rng = np.random.default_rng(1)
    raw = [rng.standard_normal(800_003) for _ in range(3)]
    for dtype in ("f4", ml_dtypes.bfloat16):
        values = [a.astype(dtype) for a in raw]
        seen = []
        for _ in range(2):
            found = []
            for algorithm in ("auto", "direct", "ring"):
                copies = [a.copy() for a in values]
                kernels.all_reduce(copies, algorithm=algorithm)
                assert len({a.tobytes() for a in copies}) == 1
                found.append(digest(copies[:1]))
            wide = [np.stack([a, a[::-1]], 1) for a in values]
            kernels.all_reduce([a[:, 1] for a in wide], "mean")
            assert all((a[:, 0] == b).all() for a, b in zip(wide, values))
            found.append(digest(wide))
            found.append(digest([kernels.reduce(values)]))
            found.append(digest(kernels.reduce_scatter(values)))
            found.append(digest(kernels.all_to_all(values)))
            copies = [[a[k::2].copy() for a in values] for k in range(2)]
            kernels.all_reduce_many(copies)
            found.append(digest(sum(copies, [])))
            seen.append(found)
        assert seen[0] == seen[1]
        print(found)
    turning = [(a + 1j * a[::-1]).astype("c8") for a in raw]
    for function in (kernels.direct_all_reduce, kernels.ring_all_reduce):
        print(digest(function([a.copy() for a in turning], "prod")))
"""


@only_cpu
def test_the_same_bits_in_every_run_with_any_number_of_threads() -> None:
    ended = [
        fork_server.run(textwrap.dedent(_DIGESTS), DVKERNELS_NUM_THREADS=str(count))
        for count in (1, 2, 3)
    ]
    assert [(done.returncode, done.stderr) for done in ended] == [(0, "")] * 3
    assert len({done.stdout for done in ended}) == 1


def _calls() -> dict[str, tuple[Any, list[Any]]]:
    """Return calls on fresh arrays, each with its expected result."""
    values = [np.random.default_rng(k).integers(-50, 50, 50_001).astype("f4") for k in range(3)]
    total, parts = np.sum(values, 0), [np.array_split(value, 3) for value in values]

    def copies() -> list[Any]:
        return [value.copy() for value in values]

    return {
        "direct": (lambda: kernels.direct_all_reduce(copies()), [total] * 3),
        "ring": (lambda: kernels.ring_all_reduce(copies()), [total] * 3),
        "max": (lambda: kernels.all_reduce(copies(), "max"), [np.max(values, 0)] * 3),
        "reduce": (lambda: [kernels.reduce(values, "min")], [np.min(values, 0)]),
        "broadcast": (lambda: kernels.broadcast(copies(), 2), [values[2]] * 3),
        "reduce_scatter": (lambda: kernels.reduce_scatter(values), np.array_split(total, 3)),
        "all_gather": (lambda: kernels.all_gather(values), [np.concatenate(values)] * 3),
        "all_to_all": (
            lambda: kernels.all_to_all(values),
            [np.concatenate([part[k] for part in parts]) for k in range(3)],
        ),
        "many": (
            lambda: arrays_in(kernels.all_reduce_many([copies(), copies()])),
            [total] * 6,
        ),
    }


def _is_right(call: Any, expected: Any) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(call(), expected, strict=True))


@only_cpu
def test_threads_calling_different_functions_at_once() -> None:
    calls, wrong, start = _calls(), [], threading.Barrier(9)

    def work(name: str) -> None:
        try:
            start.wait(60)
            if not all(_is_right(*calls[name]) for _ in range(40)):
                wrong.append(name)
        except BaseException as error:
            wrong.append((name, error))

    threads = [threading.Thread(target=work, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def _forked(work: Any) -> int:
    """Return the exit status of a child that did the work; kill one that hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@only_cpu
@needs_fork
def test_a_forked_child_calls_everything() -> None:
    calls = _calls()
    assert all(_is_right(*call) for call in calls.values())
    assert _forked(lambda: all(_is_right(*call) for call in calls.values())) == 0
    assert all(_is_right(*call) for call in calls.values())


@only_cpu
@needs_fork
def test_a_child_forked_while_another_thread_calls() -> None:
    calls, stop, wrong = _calls(), threading.Event(), []
    assert all(_is_right(*call) for call in calls.values())

    def work() -> None:
        while not stop.is_set():
            wrong.extend(name for name, call in calls.items() if not _is_right(*call))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        statuses = [
            _forked(lambda: all(_is_right(*call) for call in calls.values())) for _ in range(5)
        ]
    finally:
        stop.set()
        thread.join()
    assert statuses == [0] * 5
    assert not wrong


# ---------------------------------------------------------------- other libraries


@only_cpu
def test_pytorch_tensors() -> None:
    torch = pytest.importorskip("torch")

    def tensors() -> list[Any]:
        return [torch.from_numpy(buffer) for buffer in fresh()]

    total, parts = np.sum(fresh(), 0), np.array_split(np.sum(fresh(), 0), 3)
    for function in ALL_REDUCERS.values():
        buffers = tensors()
        assert [id(one) for one in function(buffers)] == [id(one) for one in buffers]
        assert [one.tolist() for one in buffers] == [total.tolist()] * 3
    halves = [torch.full((2, 3), value, dtype=torch.float16).T for value in (2048.0, 1.0, 1.0)]
    assert (kernels.all_reduce(halves)[2] == 2050).all()
    for results, expected in (
        ([kernels.reduce(tensors())], [total]),
        (kernels.reduce_scatter(tensors()), parts),
        (kernels.all_gather(tensors()), [np.concatenate(fresh())] * 3),
    ):
        assert all(isinstance(one, torch.Tensor) for one in results)
        assert [one.tolist() for one in results] == [one.tolist() for one in expected]
    buffers = [*tensors()[:2], torch.ones(LENGTH + 1)]
    with pytest.raises(errors.BufferMismatchError, match="replica 2"):
        kernels.all_reduce(buffers)
    assert [one.tolist() for one in buffers[:2]] == [one.tolist() for one in fresh()[:2]]
