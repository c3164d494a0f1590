"""Launch table: the int64 words that describe the arrays of a launch to every block.

    [0] pieces   [1] items   [2] sources   [3] targets   [4] index of the first target in a record
    [5] divisor  [6] vectors per thread in a piece   [7] addresses in a record
    [8] index of the first float64 number for the kernel
    heads, two words per item: its first piece, and the index of its record
    records: axes (0: dense), elements before the first whole vector, vectors (or elements, where
    there are axes), elements after, whether all arrays have the strides of the first; the
    addresses; for each axis, the innermost first, its extent and the strides in bytes

A short table is passed as the arguments of the launch: no copy precedes the launch, no memory has
to outlive it, and a captured graph contains it. Each block copies the arguments to shared memory,
where they can be indexed. A long table lies in device memory, and the first argument is its
address.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cuda as numba_cuda
from numba import types

from dvkernels.kernels.cuda.engine import intrinsics

__all__ = ["HEADER", "NUM_WORDS", "RECORD", "THREADS", "byte_offset", "entry", "locate", "stage"]

cuda: Any = numba_cuda  # its functions carry no types

THREADS = 256  # per block, at least: eight warps copy the words to shared memory
NUM_WORDS = 128  # arguments of a launch: 1 KiB of the possible 4 KiB
HEADER = 9
RECORD = 5

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_SHARED = 3  # the address space of shared memory
_WARP = 32


def _simulated_entry(table: int, index: int) -> int:
    return int(intrinsics.load_word(table, index))


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


@cuda.jit(device=True, inline="always")
def locate(table, piece):  # type: ignore[no-untyped-def]
    """Return the item of a piece: the last item whose first piece is not after it."""
    low, high = 0, entry(table, 1)
    while high - low > 1:
        middle = (low + high) >> 1
        if entry(table, HEADER + 2 * middle) <= piece:
            low = middle
        else:
            high = middle
    return low


@cuda.jit(device=True, inline="always")
def byte_offset(record, width, position, element, itemsize):  # type: ignore[no-untyped-def]
    """Return the offset in bytes of an element in the array at ``position`` of a record."""
    num_axes = entry(record, 0)
    offset = element * itemsize if num_axes == 0 else 0
    axis = record + 8 * (RECORD + width)
    for _ in range(num_axes):
        extent = entry(axis, 0)
        quotient = intrinsics.quotient(element, extent)
        offset += (element - quotient * extent) * entry(axis, 1 + position)
        element = quotient
        axis += 8 * (1 + width)
    return offset
