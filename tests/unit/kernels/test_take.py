"""Rows taken by compiled code equal NumPy's."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from dvkernels.kernels.cpu import take
from dvkernels.kernels.cpu.engine import thread_pool

BYTES = np.random.default_rng(0).integers(0, 256, 64_000, np.uint8)
DTYPES = ["?", "u1", "<u2", "<f4", ">f8", "<c16", "S5", "<U3", "M8[s]", "V7", "<i8,>f4", "f2"]
SHAPES = {
    "scalars": lambda a: a,
    "every other": lambda a: a[::2],
    "backwards": lambda a: a[::-1],
    "rows": lambda a: a.reshape(-1, 3),
    "Fortran": lambda a: np.asfortranarray(a.reshape(-1, 5)),
    "columns": lambda a: a.reshape(-1, 12)[:, 1::3],
    "mirrored": lambda a: a.reshape(-1, 4)[:, ::-1],
    "blocks": lambda a: a.reshape(-1, 3, 4)[:, 1:, :3],
    "transposed": lambda a: a.reshape(-1, 3, 4).transpose(0, 2, 1),
    "repeated": lambda a: np.broadcast_to(a[:20, None], (20, 4)),
    "one row": lambda a: np.broadcast_to(a[:3], (20, 3)),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_equal_those_of_numpy(shape, shared, monkeypatch):
    monkeypatch.setattr(thread_pool, "SHARED_NBYTES", 0 if shared else 1 << 62)
    arrays = []
    for name in DTYPES:
        dtype = np.dtype(name)
        array = SHAPES[shape](BYTES[: 2400 * dtype.itemsize].view(dtype))
        if take.takes(array):
            arrays.append(array[:200] if len(array) > 200 else array)
        else:
            assert shape in ("transposed", "blocks")
    for length in {len(array) for array in arrays}:
        group = [array for array in arrays if len(array) == length]
        taker = copy.deepcopy(take.RowTaker(group))
        for count in (1, 17, 300):
            indices = np.random.default_rng(count).integers(0, length, count)
            targets = [np.empty((count, *a.shape[1:]), a.dtype) for a in group]
            taker.take_into(targets, indices)
            for target, array in zip(targets, group, strict=True):
                assert target.tobytes() == array[indices].tobytes()


@pytest.mark.parametrize("wrong", [-1, 200, 2**62])
def test_an_index_that_names_no_row_is_an_error(wrong):
    taker = take.RowTaker([np.arange(200), np.ones((200, 3))])
    indices = np.arange(500) % 200
    indices[400] = wrong
    with pytest.raises(IndexError, match=r"0 to 199; got 1 others"):
        taker.take_into([np.empty(500, int), np.empty((500, 3))], indices)


def test_arrays_with_references_or_without_elements_are_left_to_numpy():
    text = np.array(["a"], np.dtypes.StringDType()) if hasattr(np.dtypes, "StringDType") else None
    for array in (np.array([[], {}], object), np.zeros(3, "O,i4"), np.zeros((0, 2)), text):
        assert array is None or not take.takes(array)
