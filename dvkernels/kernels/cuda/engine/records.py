"""Records of int64 words in the tables that kernels read, by the names of their fields.

A record is declared once, as a NamedTuple: the host writes the fields in their order, and a kernel
reads all of them at once. The loads of the fields that it does not use are optimized away.
"""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import ir
from numba import types

from dvkernels.kernels.cuda.engine import intrinsics

__all__ = ["at"]

_untyped: Any = types  # its classes carry no types
_I64 = ir.IntType(64)


def at(record: Any) -> Any:
    """Return the device function of an address in a table: the record there."""
    count = len(record._fields)
    kind = _untyped.NamedUniTuple(types.int64, count, record)

    def simulated(address: int) -> Any:
        return record._make((ctypes.c_int64 * count).from_address(address))

    @intrinsics.twin(simulated)
    def read(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            start = builder.inttoptr(args[0], _I64.as_pointer())
            words = [builder.load(builder.gep(start, [_I64(k)]), align=8) for k in range(count)]
            return context.make_tuple(builder, kind, words)

        return kind(types.int64), generate

    return read
