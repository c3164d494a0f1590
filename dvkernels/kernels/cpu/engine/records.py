"""Records in raw memory: int64 words that compiled code reads and writes by name.

A record is declared once, as a NamedTuple: Python fills its words with such a tuple, and compiled
code sees ``job.num_pieces``, a plain load, through the views made here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types

from dvkernels.kernels.cpu.engine import intrinsics

__all__: list[str] = []

LINE_NBYTES = 64  # of a cache line


def layout(record: Any, *, alone: Collection[str] = (), nbytes: int = 0) -> np.dtype[Any]:
    """Return the dtype of a NamedTuple of words, which is at least ``nbytes`` long.

    Fields in ``alone`` lie on a cache line of their own, where threads do not disturb each other.
    """
    offsets, end = [], 0
    for name in record._fields:
        offsets.append(-(-end // LINE_NBYTES) * LINE_NBYTES if name in alone else end)
        end = offsets[-1] + (LINE_NBYTES if name in alone else 8)
    return np.dtype(
        {
            "names": record._fields,
            "formats": [np.int64] * len(offsets),
            "offsets": offsets,
            "itemsize": max(end, nbytes),
        }
    )


def index(record: np.dtype[Any], field: str) -> int:
    """Return the index of a field among the words of a record."""
    assert record.fields is not None
    return record.fields[field][1] // 8


def view(record: np.dtype[Any]) -> Any:
    """Return a compiled function of an address: the record there."""
    memory = ir.ArrayType(ir.IntType(8), record.itemsize).as_pointer()

    @intrinsics.emitted(from_dtype(record), types.int64)
    def at(builder: Any, address: Any) -> Any:
        return builder.inttoptr(address, memory)

    return at


def nth(record: np.dtype[Any]) -> Any:
    """Return a compiled function of an address and k: record k of those that begin there."""
    memory = ir.ArrayType(ir.IntType(8), record.itemsize).as_pointer()

    @intrinsics.emitted(from_dtype(record), types.int64, types.int64)
    def at(builder: Any, address: Any, k: Any) -> Any:
        offset = builder.mul(k, ir.IntType(64)(record.itemsize))
        return builder.inttoptr(builder.add(address, offset), memory)

    return at
