"""The table of a launch: int64 words that say which arrays there are, read by every block.

    [0] pieces   [1] items   [2] sources   [3] targets   [4] where targets begin in a record
    [5] divisor  [6] vectors of a piece that one thread takes   [7] addresses in a record
    [8] where float64 numbers begin that the kernel needs
    heads, two words an item: its first piece, and where its record begins
    records: axes (0: dense), elements before the first whole vector, vectors (or elements, where
    there are axes), elements after, whether all arrays have the strides of the first; the
    addresses; for each axis, the innermost first, its extent and the strides in bytes

A short table travels with the launch, as its arguments: nothing is copied ahead of it, no memory
has to outlive it, and a captured graph holds it. Each block puts it where it can be indexed, in
shared memory. A long one lies in device memory, and the first argument is its address.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cuda as numba_cuda
from numba import types

from dvkernels.kernels.cuda.engine import intrinsics

__all__ = ["HEADER", "NUM_WORDS", "RECORD", "THREADS", "entry", "hold", "locate", "shift"]

cuda: Any = numba_cuda  # its functions carry no types

THREADS = 256  # of a block, at least: eight warps bring the words in
NUM_WORDS = 128  # arguments of a launch: 1 KiB of the 4 KiB there may be
HEADER = 9
RECORD = 5

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_SHARED = 3  # an address space
_WARP = 32


def _entry(table: int, index: int) -> int:
    return int(intrinsics.load_word(table, index))


@intrinsics.twin(_entry)
def entry(typing: Any, table: Any, index: Any) -> Any:
    """Read a word of a table, wherever it lies."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.load(builder.gep(start, [args[1]]), align=8)

    return types.int64(types.int64, types.int64), generate


def _hold(words: Any) -> int:
    return int(words[0])


@intrinsics.twin(_hold)
def hold(typing: Any, words: Any) -> Any:
    """Return the address of the table that the arguments of a launch hold, or name.

    All threads of a block must call it.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = args[0].type.count - 1
        room = ir.GlobalVariable(
            builder.module, ir.ArrayType(_I64, count), context.mangler("held", []), _SHARED
        )
        room.linkage, room.align = "internal", 16
        room.initializer = ir.Constant(room.type.pointee, ir.Undefined)
        named = builder.extract_value(args[0], 0)
        before = builder.block
        is_here = builder.icmp_signed("==", named, _I64(0))
        with builder.if_then(is_here):
            _bring_in(builder, args[0], room, count)
            generic = builder.addrspacecast(room, ir.PointerType(room.type.pointee))
            held = builder.ptrtoint(generic, _I64)
            within = builder.block
        table = builder.phi(_I64)
        table.add_incoming(named, before)
        table.add_incoming(held, within)
        return table

    return types.int64(words), generate


def _bring_in(builder: Any, words: Any, room: Any, count: int) -> None:
    """Emit the stores of all words: the first lane of each warp its share, one after another."""
    thread = _special(builder, "tid.x")
    share = -(-count * _WARP // THREADS)
    is_first = builder.icmp_signed("==", builder.and_(thread, _I32(_WARP - 1)), _I32(0))
    with builder.if_then(is_first):
        warp = builder.lshr(thread, _I32(5))
        for number, begin in enumerate(range(0, count, share)):
            with builder.if_then(builder.icmp_signed("==", warp, _I32(number))):
                for k in range(begin, min(begin + share, count)):
                    place = builder.gep(room, [_I32(0), _I32(k)])
                    builder.store(builder.extract_value(words, k + 1), place, align=8)
    intrinsics.assemble(builder, ir.VoidType(), "bar.sync 0;", "~{memory}", [])


def _special(builder: Any, register: str) -> Any:
    code = f"mov.u32 $0, %{register};"
    return builder.asm(ir.FunctionType(_I32, []), code, "=r", [], side_effect=False)


@cuda.jit(device=True, inline="always")
def locate(table, piece):  # type: ignore[no-untyped-def]
    """Return which item a piece belongs to: the last that begins before it."""
    low, high = 0, entry(table, 1)
    while high - low > 1:
        middle = (low + high) >> 1
        if entry(table, HEADER + 2 * middle) <= piece:
            low = middle
        else:
            high = middle
    return low


@cuda.jit(device=True, inline="always")
def shift(record, width, position, element, itemsize):  # type: ignore[no-untyped-def]
    """Return how many bytes after its address the array at a position has an element."""
    num_axes = entry(record, 0)
    found = element * itemsize if num_axes == 0 else 0
    axis = record + 8 * (RECORD + width)
    for _ in range(num_axes):
        extent = entry(axis, 0)
        rest = intrinsics.quotient(element, extent)
        found += (element - rest * extent) * entry(axis, 1 + position)
        element = rest
        axis += 8 * (1 + width)
    return found
