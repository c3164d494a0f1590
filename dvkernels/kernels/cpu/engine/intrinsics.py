"""Intrinsics on raw memory for compiled code: loads, stores, atomics, prefetches, pauses.

A table is int64 words, named by an address and an index: ``load(table, 3)`` reads the word 24 bytes
past ``table``. Words that several threads change are fields of records (see records.py), named by
the record and the field. Atomic operations are sequentially consistent.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils as numba_cgutils

from dvkernels.kernels import checks, jit

__all__ = [
    "address_of",
    "call",
    "compare_exchange",
    "exchange",
    "fetch_add",
    "keep_alive",
    "load",
    "load_shared",
    "pause",
    "pointer",
    "prefetch",
    "relax",
    "store",
    "store_shared",
    "stream_line",
    "words",
    "yield_core",
]

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_intrinsic: _Decorator = extending.intrinsic
_atomic: _Decorator = extending.intrinsic(prefer_literal=True)
_cgutils: Any = numba_cgutils  # its functions carry no types
_HAS_PAUSE = platform.machine() in ("x86_64", "AMD64")
_I64 = ir.IntType(64)
_LINE = 64


def words(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return ``count`` zeroed int64 words that begin on a cache line."""
    memory = np.zeros(count + _LINE // 8, np.int64)
    skipped = -checks.address(memory) % _LINE // 8
    return memory[skipped : skipped + count]


def _word(builder: Any, args: Any) -> Any:
    """Emit the pointer to word ``args[1]`` after the address ``args[0]``."""
    return builder.gep(builder.inttoptr(args[0], _I64.as_pointer()), [args[1]])


def _field(builder: Any, signature: Any, args: Any) -> Any:
    """Emit the pointer to the field ``args[1]`` of the record ``args[0]``."""
    record, name = signature.args[:2]
    offset = record.offset(name.literal_value)
    return _cgutils.get_record_member(builder, args[0], offset, _I64)


@_intrinsic
def load(typing: Any, table: Any, index: Any) -> Any:
    """Read a word."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_word(builder, args))

    return types.int64(types.int64, types.int64), generate


@_intrinsic
def store(typing: Any, table: Any, index: Any, value: Any) -> Any:
    """Write a word."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _word(builder, args))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@_atomic
def load_shared(typing: Any, record: Any, field: Any) -> Any:
    """Read a field that other threads write, atomically."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_field(builder, signature, args), "seq_cst", 8)

    return types.int64(record, field), generate


@_atomic
def store_shared(typing: Any, record: Any, field: Any, value: Any) -> Any:
    """Write a field that other threads read, atomically."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _field(builder, signature, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(record, field, types.int64), generate


@_atomic
def fetch_add(typing: Any, record: Any, field: Any, value: Any) -> Any:
    """Add to a field and return its previous value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _field(builder, signature, args), args[2], "seq_cst")

    return types.int64(record, field, types.int64), generate


@_atomic
def exchange(typing: Any, record: Any, field: Any, value: Any) -> Any:
    """Write a field and return its previous value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _field(builder, signature, args), args[2], "seq_cst")

    return types.int64(record, field, types.int64), generate


@_atomic
def compare_exchange(typing: Any, record: Any, field: Any, expected: Any, value: Any) -> Any:
    """Write a field if it is ``expected``; return its previous value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _field(builder, signature, args)
        pair = builder.cmpxchg(pointer, args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return types.int64(record, field, types.int64, types.int64), generate


@_intrinsic
def address_of(typing: Any, array: Any) -> Any:
    """Return the address of an array's first element; see :func:`keep_alive`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, _I64)

    return types.int64(array), generate


@_intrinsic
def keep_alive(typing: Any, array: Any) -> Any:
    """Use an array: Numba frees one after the last use of its name, not of its address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), generate


@_intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """Return an address as the pointer that ``numba.carray`` takes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@_intrinsic
def stream_line(typing: Any, address: Any, value: Any) -> Any:
    """Fill the cache line at an address (a multiple of 64) with a word, by a streaming store."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _LINE // 8
        vector = ir.VectorType(_I64, lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        single = builder.insert_element(undefined, args[1], ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        line = builder.shuffle_vector(single, undefined, mask)
        stored = builder.store(line, builder.inttoptr(args[0], vector.as_pointer()), align=_LINE)
        one = ir.Constant(ir.IntType(32), 1)
        stored.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Prefetch the cache line at an address, for writing."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [byte, *[ir.IntType(32)] * 3])
        function = _cgutils.get_or_insert_function(
            builder.module, function_type, "llvm.prefetch.p0"
        )
        purpose = [ir.Constant(ir.IntType(32), number) for number in (1, 3, 1)]
        builder.call(function, [builder.inttoptr(args[0], byte), *purpose])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@_intrinsic
def call(typing: Any, function: Any, argument: Any) -> Any:
    """Call the compiled ``void function(int64)`` at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_intrinsic
def pause(typing: Any) -> Any:
    """Hint to the core that this is a spin loop; do nothing where it has no such instruction."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_PAUSE:
            function_type = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(_cgutils.get_or_insert_function(builder.module, function_type, name), [])
        return context.get_dummy_value()

    return types.void(), generate


if os.name == "posix":
    yield_core = types.ExternalFunction("sched_yield", types.intc())
else:  # without it a spinning thread keeps its core until the system preempts it

    @jit.njit(nogil=True)
    def yield_core():  # type: ignore[no-untyped-def]
        """Do nothing."""
        return 0


@jit.njit(nogil=True)
def relax(turn):  # type: ignore[no-untyped-def]
    """Pause, and every 256th time (7 us) yield the core to a thread that waits for it.

    With a core for each thread this costs nothing; on a busy machine the thread that is waited for
    may need this very core (2 replicas beside another program: a step took 3.3 ms without it).
    """
    pause()
    if turn & 255 == 255:
        yield_core()
