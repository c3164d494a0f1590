"""Laws of the kernels over dtypes, lengths and numbers of replicas; overlaps."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import examples, kernels

# Few dtypes, because each kernel compiles for 0.3 s; sizes around the 128 bytes of an iteration.
_CASES = st.tuples(
    st.sampled_from([("sum", "f4"), ("max", "f4"), ("sum", "i1"), ("mean", "f8")]),
    st.integers(1, 9),
    st.integers(0, 300),
    st.integers(0, 2**32 - 1),
)


def _buffers(dtype: str, count: int, length: int, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.integers(-100, 100, length).astype(dtype) for _ in range(count)]


@settings(max_examples=examples(60), deadline=None)
@given(_CASES)
def test_direct_and_ring_agree_and_all_replicas_end_alike(case: Any) -> None:
    (op, dtype), count, length, seed = case
    buffers = _buffers(dtype, count, length, seed)
    one = kernels.reduce(buffers, op)  # whole numbers: exact in any order
    out = [np.empty_like(one) for _ in buffers]
    kernels.ring_all_reduce(buffers, op, out=out)
    kernels.direct_all_reduce(buffers, op)
    assert {array.tobytes() for array in [*out, *buffers]} == {one.tobytes()}


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(1, 9), st.integers(0, 300), st.data())
def test_every_buffer_ends_with_the_root(count: int, length: int, data: Any) -> None:
    root = data.draw(st.integers(0, count - 1))
    buffers = [np.full(length, k, "i2") for k in range(count)]
    kernels.broadcast(buffers, root)
    assert all((buffer == root).all() for buffer in buffers)


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 4), st.integers(1, 4))
def test_overlap_is_decided_exactly(first: int, second: int, step: int, other: int) -> None:
    base = np.ones(64, "f4")
    a, b = base[first::step][:6], base[second::other][:6]
    touched = set(range(64)[first::step][:6]) & set(range(64)[second::other][:6])
    try:
        kernels.all_reduce([a, b])
    except ValueError:
        assert touched
        assert (base == 1).all()
    else:
        assert not touched
        assert (a == 2).all()
        assert (b == 2).all()
