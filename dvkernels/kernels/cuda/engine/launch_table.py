"""Launch table: the int64 words that describe the arrays of a launch to every block.

It consists of a ``TableHeader``, an ``ItemHead`` for each item, the items, and float64 numbers for
the kernel. An item is an ``ItemRecord``, its addresses and, for each axis, the innermost first, its
extent and its strides in bytes.

A short table is passed as the arguments of the launch: no copy precedes the launch, no memory has
to outlive it, and a captured graph contains it. Each block copies the arguments to shared memory,
where they can be indexed. A long table lies in device memory, and the first argument is its
address.
"""

from __future__ import annotations

from typing import Any

from numba import types

from dvkernels.kernels.cuda.engine import inline_ptx, intrinsics, records
from dvkernels.kernels.cuda.engine.table_layout import (
    NUM_WORDS,
    THREADS,
    ItemHead,
    ItemRecord,
    TableHeader,
)

__all__ = [
    "addresses",
    "byte_offset",
    "entry",
    "header",
    "item",
    "locate",
    "stage",
]

_untyped: Any = types  # its classes carry no types
_WARP = 32


header, item, _head = records.at(TableHeader), records.at(ItemRecord), records.at(ItemHead)
_HEADS = len(TableHeader._fields)  # index of the first head
_ADDRESSES = len(ItemRecord._fields)


@intrinsics.inlined
def entry(table, index):  # type: ignore[no-untyped-def]
    """Return a word of a table in shared or device memory."""
    return intrinsics.read_word(table + 8 * index)


def _copy_to_shared(count: int) -> str:
    """Return the PTX that copies ``$2`` and the next words to shared memory, unless ``$1`` is set.

    Lane 0 of each warp stores its share, one word after another.
    """
    share = -(-count * _WARP // THREADS)
    shares = "".join(
        f"""
        setp.ne.u32 %skips, %warp, {number};
        @%skips bra after_{number};
        {" ".join(f"st.shared.b64 [launch_table+{8 * k}], ${2 + k};" for k in words)}
        after_{number}:"""
        for number, begin in enumerate(range(0, count, share))
        for words in [range(begin, min(begin + share, count))]
    )
    return f"""{{
        .shared .align 16 .b64 launch_table[{count}];
        .reg .pred %skips;
        .reg .b32 %thread, %lane, %warp;
        .reg .b64 %table;
        mov.b64 %table, $1;
        setp.ne.s64 %skips, %table, 0;
        @%skips bra staged;
        mov.u32 %thread, %tid.x;
        and.b32 %lane, %thread, {_WARP - 1};
        shr.u32 %warp, %thread, 5;
        setp.ne.u32 %skips, %lane, 0;
        @%skips bra stored;{shares}
        stored:
        bar.sync 0;
        mov.u64 %table, launch_table;
        cvta.shared.u64 %table, %table;
        staged:
        mov.b64 $0, %table;
    }}"""


# Return the address of the launch's table: copied to shared memory, or in device memory. All
# threads of a block must call this function.
stage = inline_ptx.device_function(
    inline_ptx.Code(
        _copy_to_shared(NUM_WORDS - 1), types.int64, [_untyped.UniTuple(types.int64, NUM_WORDS)]
    ),
    lambda words: int(words[0]),
)


@intrinsics.inlined
def locate(table, piece):  # type: ignore[no-untyped-def]
    """Return the head of a piece's item: the last one whose first piece is not after it."""
    heads = table + 8 * _HEADS
    low, high = 0, header(table).num_items
    while high - low > 1:
        middle = (low + high) >> 1
        if _head(heads + 16 * middle).first_piece <= piece:
            low = middle
        else:
            high = middle
    return _head(heads + 16 * low)


@intrinsics.inlined
def addresses(record):  # type: ignore[no-untyped-def]
    """Return the table of the addresses of an item."""
    return record + 8 * _ADDRESSES


@intrinsics.inlined
def byte_offset(record, width, position, element, itemsize):  # type: ignore[no-untyped-def]
    """Return the offset in bytes of an element in the array at ``position`` of a record."""
    num_axes = item(record).num_axes
    offset = element * itemsize if num_axes == 0 else 0
    axis = addresses(record) + 8 * width
    for _ in range(num_axes):
        extent = entry(axis, 0)
        quotient = intrinsics.quotient(element, extent)
        offset += (element - quotient * extent) * entry(axis, 1 + position)
        element = quotient
        axis += 8 * (1 + width)
    return offset
