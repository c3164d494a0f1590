"""Checks of the buffers of a collective: errors that name the replica and the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from dvkernels import errors, kernels

_BASE = np.zeros(8)
_READ_ONLY = np.zeros(4)
_READ_ONLY.flags.writeable = False


def _zeros(*shape: int, dtype: Any = np.float64) -> Any:
    return np.zeros(shape, dtype)


class _OnGpu:
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    "function", [kernels.all_reduce, kernels.ring_all_reduce, kernels.broadcast]
)
@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        ([_zeros(4), _zeros(5)], errors.BufferMismatchError, r"replica 1 holds float64\[5\].*pad"),
        ([_zeros(4), _zeros(4, dtype="f4")], errors.BufferMismatchError, "replica 1 holds float32"),
        ([], errors.BufferMismatchError, "at least one"),
        (3, errors.NotABufferError, "sequence of arrays.*int"),
        ([_zeros(2), [1.0, 2.0]], errors.NotABufferError, "replica 1 is a list"),
        ([np.float64(1)], errors.NotABufferError, "replica 0 is a float64"),
        ([np.ma.masked_array([1.0])], errors.NotABufferError, "MaskedArray"),
        ([_zeros(4), _READ_ONLY], errors.BufferMismatchError, "replica 1 is read-only"),
        ([_BASE, _BASE], errors.BufferMismatchError, "replica 0 overlaps replica 1"),
        ([_BASE[:5], _BASE[3:]], errors.BufferMismatchError, "overlaps"),
        ([_BASE[::2], _BASE[2:6]], errors.BufferMismatchError, "overlaps"),
        ([as_strided(_zeros(1), (4,), (0,))], errors.BufferMismatchError, "share memory"),
        ([as_strided(_zeros(9), (3, 3), (8, 16))], errors.BufferMismatchError, "share memory"),
        ([_zeros(4), _OnGpu()], errors.BufferMismatchError, "GPU memory"),
        ([_OnGpu(), _OnGpu()], errors.DeviceError, "GPU"),
    ],
)
def test_bad_buffers_raise(function: Any, buffers: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        function(buffers)


@pytest.mark.parametrize(
    ("op", "dtype", "error"),
    [
        ("median", "f8", errors.ReduceOpError),
        ([], "f8", errors.ReduceOpError),
        ("mean", "i4", errors.UnsupportedDTypeError),
        ("sum", "?", errors.UnsupportedDTypeError),
        ("sum", "O", errors.UnsupportedDTypeError),
        ("sum", ">f8", errors.UnsupportedDTypeError),
        ("sum", "U3", errors.UnsupportedDTypeError),
    ],
)
def test_ops_and_dtypes(op: Any, dtype: str, error: Any) -> None:
    for function in (kernels.all_reduce, kernels.ring_all_reduce, kernels.reduce):
        with pytest.raises(error):
            function([np.zeros(3, dtype), np.zeros(3, dtype)], op)


@pytest.mark.parametrize("algorithm", ["tree", None, ["ring"]])
def test_an_unknown_algorithm_raises(algorithm: Any) -> None:
    with pytest.raises(errors.AlgorithmError, match="'direct', 'ring'"):
        kernels.all_reduce([_zeros(2)], algorithm=algorithm)


@pytest.mark.parametrize("root", [-1, 2, 0.0, None, True, "0"])
def test_a_root_that_is_no_replica_raises(root: Any) -> None:
    with pytest.raises(errors.BufferMismatchError, match=r"root in 0\.\.1"):
        kernels.broadcast([_zeros(2), _zeros(2)], root)


def test_broadcast_of_objects_raises() -> None:
    with pytest.raises(errors.UnsupportedDTypeError, match="Python objects"):
        kernels.broadcast([np.array([None]), np.array([None])])


@pytest.mark.parametrize(
    ("make_out", "message"),
    [
        (lambda a, b: [_zeros(4)], "2 out arrays; got 1"),
        (lambda a, b: [_zeros(4), _zeros(5)], "out 1 holds"),
        (lambda a, b: [_zeros(4, dtype="f4")] * 2, "out 0 holds float32"),
        (lambda a, b: [_zeros(4), _READ_ONLY], "out 1 is read-only"),
        (lambda a, b: [b, a], "out (0 overlaps replica 1|1 overlaps replica 0)"),
        (lambda a, b: [a[::-1], _zeros(4)], "out 0 overlaps replica 0"),
        (lambda a, b: [_BASE[1:5], _BASE[4:]], "out 0 overlaps out 1"),
    ],
)
def test_a_wrong_out_raises_before_any_write(make_out: Any, message: str) -> None:
    a, b = np.arange(4.0), np.arange(4.0, 8.0)
    for function in (kernels.direct_all_reduce, kernels.ring_all_reduce):
        with pytest.raises(errors.BufferMismatchError, match=message):
            function([a, b], out=make_out(a, b))
    assert a.tolist() == [0, 1, 2, 3]
    assert b.tolist() == [4, 5, 6, 7]


def test_out_may_be_the_very_buffers() -> None:
    for function in (kernels.direct_all_reduce, kernels.ring_all_reduce):
        a, b = np.arange(4.0), np.arange(4.0)
        function([a, b], out=[a, b])
        assert a.tolist() == b.tolist() == [0, 2, 4, 6]
    assert kernels.reduce([a, b], out=a) is a


def test_interleaved_views_share_nothing() -> None:
    base = np.arange(8.0)
    kernels.all_reduce([base[::2], base[1::2]])
    assert base.tolist() == [1, 1, 5, 5, 9, 9, 13, 13]
