"""Records of int64 words in the tables that kernels read, by the names of their fields.

A record is declared once, as a NamedTuple: the host writes the fields in their order, and a kernel
reads all of them at once. The loads of the fields that it does not use are optimized away. A record
is read where the kernel says so: words that LLVM kept from there to later uses would cost registers
in the loops between.
"""

from __future__ import annotations

import ctypes
from typing import Any

from numba import types

from dvkernels.kernels.cuda.engine import inline_ptx

__all__ = ["at"]

_untyped: Any = types  # its classes carry no types


def at(record: Any) -> Any:
    """Return the device function of an address in a table: the record there."""
    count = len(record._fields)
    kind = _untyped.NamedUniTuple(types.int64, count, record)

    def simulated(address: int) -> Any:
        return record._make((ctypes.c_int64 * count).from_address(address))

    loads = [f"ld.b64 ${k}, [${count}+{8 * k}];" for k in range(count)]
    code = inline_ptx.Code(" ".join(loads), kind, [types.int64])
    return inline_ptx.device_function(code, simulated)
