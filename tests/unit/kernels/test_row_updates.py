"""Rows updated by compiled code have the bits that one update after another gives in NumPy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from dvkernels import reduce_op
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels.cpu import row_updates
from dvkernels.kernels.cpu.engine import thread_pool

UFUNCS = {
    "scatter_add": np.add,
    "scatter_sub": np.subtract,
    "scatter_mul": np.multiply,
    "scatter_div": np.divide,
    "scatter_min": np.minimum,
    "scatter_max": np.maximum,
    "scatter_update": lambda _, update: update,
}
DTYPES = ["?", "i1", "u2", "i4", "u8", "f2", ml_dtypes.bfloat16, "f4", "f8", "c8", "c16"]
WIDTHS = [(), (1,), (3,), (2, 5), (16,), (45,), (64,)]
RNG = np.random.default_rng(0)


def numbers(shape, dtype):
    """Return random numbers, a NaN and zeros among the real ones; the complex ones are whole."""
    dtype = np.dtype(dtype)
    if dtype.kind in "biu":
        return RNG.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)
    if dtype.kind == "c":  # so that fused operations of NumPy round nothing
        return (RNG.integers(-2, 3, shape) + RNG.integers(-2, 3, shape) * 1j).astype(dtype)
    made = RNG.normal(0, 1, shape)
    made.flat[:3] = np.nan, 0.0, -0.0
    return made.astype(dtype)


def one_after_another(ufunc, array, indices, updates):
    wide = reduce_op.working_dtype(array.dtype)  # half numbers are rounded once
    new, updates = array.astype(wide), updates.astype(wide)
    with np.errstate(all="ignore"):
        for index, update in zip(indices, updates, strict=True):
            new[index] = ufunc(new[index], update)
        return new.astype(array.dtype)


@pytest.fixture(params=["alone", "shared"])
def threads(request, monkeypatch):
    monkeypatch.setattr(thread_pool, "SHARED_NBYTES", 0 if request.param == "shared" else 1 << 62)


@pytest.mark.parametrize("verb", UFUNCS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates_apply_in_order(verb, dtype, threads):
    if row_updates.runner(verb, np.dtype(dtype)) is None:
        assert np.dtype(dtype).kind in "bc" or verb == "scatter_div"
        return
    for width in WIDTHS:
        array, updates = numbers((9, *width), dtype), numbers((40, *width), dtype)
        indices = RNG.integers(0, 9, 40)
        expected = one_after_another(UFUNCS[verb], array, indices, updates)
        copies = [array.copy() for _ in range(3)]
        wide = np.empty((40, 2, *width), dtype)
        wide[:, 1] = updates
        for arrays, given in (copies[:1], updates), (copies[1:], wide[:, 1]):
            row_updates.update_rows(verb, [row_updates.RowWrite(arrays, indices, given)])
        for copy in copies:
            if array.dtype.kind == "c":  # a zero has any sign
                np.testing.assert_array_equal(copy, expected, f"{verb}, rows {width}")
            else:
                assert copy.tobytes() == expected.tobytes(), (verb, width)


def test_several_lists_apply_one_after_another_to_their_own_arrays(threads):
    first, second = np.zeros((4, 3)), np.ones((4, 3))
    updates = np.arange(6.0).reshape(2, 3)
    writes = [
        row_updates.RowWrite([first], np.array([1, 1]), updates),
        row_updates.RowWrite([second], np.array([0, 3]), updates),
        row_updates.RowWrite([first], np.array([3, 1]), updates[:, ::-1]),
    ]
    row_updates.update_rows("scatter_add", writes, 2)
    np.testing.assert_array_equal(first[[1, 3]], [[4.0, 4.5, 5.0], [1.0, 0.5, 0.0]])
    np.testing.assert_array_equal(second, [[1, 1.5, 2], [1, 1, 1], [1, 1, 1], [2.5, 3, 3.5]])


@pytest.mark.parametrize("width", [1, 7, 64])
def test_the_bits_do_not_depend_on_the_number_of_threads(width, monkeypatch):
    rows, indices = RNG.normal(size=(50, width)), RNG.integers(0, 50, 20_000)
    updates, results = RNG.normal(size=(20_000, width)), []
    for num_threads in (1, 2, 5, 16):
        monkeypatch.setattr(thread_pool, "num_threads", lambda n=num_threads: n)
        results.append(rows.copy())
        write = row_updates.RowWrite([results[-1]], indices, updates)
        row_updates.update_rows("scatter_add", [write])
    assert len({result.tobytes() for result in results}) == 1


@pytest.mark.parametrize("count", [3, 500])
def test_no_update_of_several_threads_is_lost(count, threads):
    rows = np.zeros((5, 16), np.float32)
    write = row_updates.RowWrite([rows], np.arange(count) % 5, np.ones((count, 16), np.float32))

    def add(_):
        for _ in range(50):
            row_updates.update_rows("scatter_add", [write])

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(add, range(4)))
    np.testing.assert_array_equal(rows.T, [200.0 * np.bincount(np.arange(count) % 5, None, 5)] * 16)


def test_a_lock_that_a_stopped_thread_holds_is_an_error_and_is_free_after_a_fork(monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.01")
    rows, pool = np.zeros((5, 16)), thread_pool.ThreadPool()
    monkeypatch.setattr(thread_pool, "_pool", pool)
    pool.locks[:] = 1
    write = row_updates.RowWrite([rows], np.array([1, 2]), np.ones((2, 16)))
    with pytest.raises(CollectiveTimeoutError, match="scatter_add: another thread has written"):
        row_updates.update_rows("scatter_add", [write])
    assert not rows.any()
    pool.reset()  # in a forked child
    row_updates.update_rows("scatter_add", [write])
    assert rows.sum() == 32


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000])
@pytest.mark.parametrize("num_rows", [1, 5, 1 << 40])
def test_the_positions_of_a_row_are_put_together_in_their_order(count, num_rows):
    indices = RNG.integers(0, num_rows, count)
    order = row_updates._grouped(indices)
    _, first, of_row = np.unique(indices, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(order, np.argsort(first[of_row], kind="stable"))
