"""Records in raw memory: int64 words that compiled code reads and writes by name.

A record is declared once, as a NamedTuple: Python fills its words with such a tuple, and compiled
code sees ``job.num_pieces``, a plain load, through the views made here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, from_dtype, types

__all__ = ["LINE_NBYTES", "index", "layout", "nth", "view"]

LINE_NBYTES = 64  # of a cache line

_I64 = ir.IntType(64)


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


def view(record: np.dtype[Any]) -> Callable[..., Any]:
    """Return a compiled function of an address: the record there."""
    kind: Any = from_dtype(record)

    @extending.intrinsic
    def at(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), generate

    return at


def nth(record: np.dtype[Any]) -> Callable[..., Any]:
    """Return a compiled function of an address and k: record k of those that begin there."""
    kind: Any = from_dtype(record)

    @extending.intrinsic
    def at(typing: Any, address: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            start = builder.add(args[0], builder.mul(args[1], _I64(record.itemsize)))
            return builder.inttoptr(start, context.get_value_type(kind))

        return kind(types.int64, types.int64), generate

    return at
