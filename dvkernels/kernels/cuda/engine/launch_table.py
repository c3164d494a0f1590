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

import ctypes
from typing import Any

from llvmlite import ir
from numba import types

from dvkernels.kernels.cuda.engine import intrinsics, records
from dvkernels.kernels.cuda.engine.table_layout import THREADS, ItemHead, ItemRecord, TableHeader

__all__ = [
    "addresses",
    "byte_offset",
    "entry",
    "header",
    "item",
    "locate",
    "stage",
]

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_SHARED = 3  # the address space of shared memory
_WARP = 32


header, item, _head = records.at(TableHeader), records.at(ItemRecord), records.at(ItemHead)
_HEADS = len(TableHeader._fields)  # index of the first head
_ADDRESSES = len(ItemRecord._fields)


def _simulated_entry(table: int, index: int) -> int:
    return ctypes.c_int64.from_address(table + 8 * index).value


@intrinsics.twin(_simulated_entry)
def entry(typing: Any, table: Any, index: Any) -> Any:
    """Read a word of a table in shared or device memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.load(builder.gep(start, [args[1]]), align=8)

    return types.int64(types.int64, types.int64), generate


def _simulated_stage(words: Any) -> int:
    return int(words[0])


@intrinsics.twin(_simulated_stage)
def stage(typing: Any, words: Any) -> Any:
    """Return the address of the launch's table: copied to shared memory, or in device memory.

    All threads of a block must call this function.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = args[0].type.count - 1
        shared = ir.GlobalVariable(
            builder.module, ir.ArrayType(_I64, count), context.mangler("launch_table", []), _SHARED
        )
        shared.linkage, shared.align = "internal", 16
        shared.initializer = ir.Constant(shared.type.pointee, ir.Undefined)
        given_address = builder.extract_value(args[0], 0)
        entry_block = builder.block
        is_in_arguments = builder.icmp_signed("==", given_address, _I64(0))
        with builder.if_then(is_in_arguments):
            _emit_copy_to_shared(builder, args[0], shared, count)
            generic = builder.addrspacecast(shared, ir.PointerType(shared.type.pointee))
            shared_address = builder.ptrtoint(generic, _I64)
            copy_block = builder.block
        table = builder.phi(_I64)
        table.add_incoming(given_address, entry_block)
        table.add_incoming(shared_address, copy_block)
        return table

    return types.int64(words), generate


def _emit_copy_to_shared(builder: Any, words: Any, shared: Any, count: int) -> None:
    """Emit the copy of all words: lane 0 of each warp stores its share, one word after another."""
    thread = _emit_special_register(builder, "tid.x")
    share = -(-count * _WARP // THREADS)
    is_first = builder.icmp_signed("==", builder.and_(thread, _I32(_WARP - 1)), _I32(0))
    with builder.if_then(is_first):
        warp = builder.lshr(thread, _I32(5))
        for number, begin in enumerate(range(0, count, share)):
            with builder.if_then(builder.icmp_signed("==", warp, _I32(number))):
                for k in range(begin, min(begin + share, count)):
                    target = builder.gep(shared, [_I32(0), _I32(k)])
                    builder.store(builder.extract_value(words, k + 1), target, align=8)
    intrinsics.inline_ptx(builder, ir.VoidType(), "bar.sync 0;", "~{memory}", [])


def _emit_special_register(builder: Any, register: str) -> Any:
    code = f"mov.u32 $0, %{register};"
    return builder.asm(ir.FunctionType(_I32, []), code, "=r", [], side_effect=False)


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
