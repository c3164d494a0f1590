"""Intrinsics on raw memory for compiled code: loads, stores, atomics, prefetches, pauses.

A table is int64 words, named by an address and an index: ``load(table, 3)`` reads the word 24 bytes
past ``table``. Words that several threads change are fields of records (see records.py), named by
the record and the field. Atomic operations are sequentially consistent.
"""

from __future__ import annotations

import functools
import inspect
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils as numba_cgutils

from dvkernels.kernels import checks, jit

__all__: list[str] = []

Emitter = Callable[..., Any]
intrinsic: Callable[[Emitter], Emitter] = extending.intrinsic
literal_intrinsic: Callable[[Emitter], Emitter] = extending.intrinsic(prefer_literal=True)
cgutils: Any = numba_cgutils  # its functions carry no types
carray: Any = vars(numba)["carray"]  # it is missing from Numba's stubs
_HAS_PAUSE = platform.machine() in ("x86_64", "AMD64")
_BYTE, _I32, _I64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
_LINE = 64


def words(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return ``count`` zeroed int64 words that begin on a cache line."""
    memory = np.zeros(count + _LINE // 8, np.int64)
    skipped = -checks.address(memory) % _LINE // 8
    return memory[skipped : skipped + count]


def emitted(result: Any, *arguments: Any) -> Callable[[Emitter], Emitter]:
    """Return a decorator: a function that emits code becomes an intrinsic of these types."""

    def decorate(emit: Emitter) -> Emitter:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if value is None else value

        @functools.wraps(emit)
        def typed(builder: Any, *given: Any) -> Any:
            return result(*arguments), generate

        return intrinsic(typed)

    return decorate


def _atomic(result: Any) -> Callable[[Emitter], Emitter]:
    """Return the same for words: compiled code gives a record and the name of a field."""

    def decorate(emit: Emitter) -> Emitter:
        _, pointer, *values = inspect.signature(emit).parameters.values()

        def typed(typing: Any, record: Any, field: Any, *given: Any) -> Any:
            offset = record.offset(field.literal_value)

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                word = cgutils.get_record_member(builder, args[0], offset, _I64)
                value = emit(builder, word, *args[2:])
                return context.get_dummy_value() if value is None else value

            return result(record, field, *[types.int64] * len(given)), generate

        names = [pointer.replace(name=name) for name in ("typing", "record", "field")]
        vars(typed)["__signature__"] = inspect.Signature([*names, *values])
        return literal_intrinsic(functools.update_wrapper(typed, emit))

    return decorate


def _word(builder: Any, table: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(table, _I64.as_pointer()), [index])


@emitted(types.int64, types.int64, types.int64)
def load(builder: Any, table: Any, index: Any) -> Any:
    """Read a word."""
    return builder.load(_word(builder, table, index))


@emitted(types.void, types.int64, types.int64, types.int64)
def store(builder: Any, table: Any, index: Any, value: Any) -> None:
    """Write a word."""
    builder.store(value, _word(builder, table, index))


@emitted(types.void, types.int64, types.int64, types.int64)
def set_word(builder: Any, table: Any, index: Any, value: Any) -> None:
    """Write a word if it has another value: the caches of other cores keep its line if not."""
    word = _word(builder, table, index)
    with builder.if_then(builder.icmp_signed("!=", builder.load(word), value)):
        builder.store(value, word)


@_atomic(types.int64)
def load_shared(builder: Any, word: Any) -> Any:
    """Read a field that other threads write, atomically."""
    return builder.load_atomic(word, "seq_cst", 8)


@_atomic(types.void)
def store_shared(builder: Any, word: Any, value: Any) -> None:
    """Write a field that other threads read, atomically."""
    builder.store_atomic(value, word, "seq_cst", 8)


@_atomic(types.int64)
def fetch_add(builder: Any, word: Any, value: Any) -> Any:
    """Add to a field and return its previous value."""
    return builder.atomic_rmw("add", word, value, "seq_cst")


@_atomic(types.int64)
def exchange(builder: Any, word: Any, value: Any) -> Any:
    """Write a field and return its previous value."""
    return builder.atomic_rmw("xchg", word, value, "seq_cst")


@_atomic(types.int64)
def compare_exchange(builder: Any, word: Any, expected: Any, value: Any) -> Any:
    """Write a field if it is ``expected``; return its previous value."""
    return builder.extract_value(builder.cmpxchg(word, expected, value, "seq_cst", "seq_cst"), 0)


@intrinsic
def address_of(typing: Any, array: Any) -> Any:
    """Return the address of an array's first element; see :func:`keep_alive`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, _I64)

    return types.int64(array), generate


@intrinsic
def keep_alive(typing: Any, array: Any) -> Any:
    """Use an array: Numba frees one after the last use of its name, not of its address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), generate


@emitted(types.voidptr, types.int64)
def pointer(builder: Any, address: Any) -> Any:
    """Return an address as the pointer that ``numba.carray`` takes."""
    return builder.inttoptr(address, _BYTE)


@emitted(types.void, types.int64, types.int64, types.int64)
def copy(builder: Any, target: Any, source: Any, nbytes: Any) -> None:
    """Copy bytes from one address to another."""
    pointers = [builder.inttoptr(address, _BYTE) for address in (target, source)]
    cgutils.raw_memcpy(builder, *pointers, nbytes, 1)


@emitted(types.void, types.int64, types.int64)
def stream_line(builder: Any, address: Any, value: Any) -> None:
    """Fill the cache line at an address (a multiple of 64) with a word, by a streaming store."""
    lanes = _LINE // 8
    vector = ir.VectorType(_I64, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    single = builder.insert_element(undefined, value, _I32(0))
    mask = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    line = builder.shuffle_vector(single, undefined, mask)
    stored = builder.store(line, builder.inttoptr(address, vector.as_pointer()), align=_LINE)
    stored.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


def emit_call(builder: Any, name: str, *args: Any) -> None:
    """Emit the call of an LLVM intrinsic that returns nothing."""
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def emit_prefetch(builder: Any, pointer: Any, to_write: bool) -> None:
    """Emit the prefetch of the cache line at a pointer to a byte."""
    emit_call(builder, "llvm.prefetch.p0", pointer, _I32(int(to_write)), _I32(3), _I32(1))


@emitted(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> None:
    """Prefetch the cache line at an address, for writing."""
    emit_prefetch(builder, builder.inttoptr(address, _BYTE), True)


@emitted(types.void, types.int64)
def prefetch_to_read(builder: Any, address: Any) -> None:
    """Prefetch the cache line at an address, for reading."""
    emit_prefetch(builder, builder.inttoptr(address, _BYTE), False)


@emitted(types.void, types.int64, types.int64)
def call(builder: Any, function: Any, argument: Any) -> None:
    """Call the compiled ``void function(int64)`` at an address."""
    kind = ir.FunctionType(ir.VoidType(), [_I64]).as_pointer()
    builder.call(builder.inttoptr(function, kind), [argument])


@emitted(types.void)
def pause(builder: Any) -> None:
    """Hint to the core that this is a spin loop; do nothing where it has no such instruction."""
    if _HAS_PAUSE:
        emit_call(builder, "llvm.x86.sse2.pause")


_int32: Any = types.int32
_int64: Any = types.int64
if os.name == "posix":
    yield_core = types.ExternalFunction("sched_yield", types.intc())
    _clock: Any = types.ExternalFunction("clock_gettime", _int32(_int32, _int64))
    _MONOTONIC = time.CLOCK_MONOTONIC

    @jit.njit(nogil=True)
    def milliseconds():  # type: ignore[no-untyped-def]
        """Return the time of a monotonic clock."""
        found = np.zeros(2, np.int64)  # seconds and nanoseconds
        _clock(_MONOTONIC, address_of(found))
        return found[0] * 1000 + found[1] // 1_000_000
else:  # without it a spinning thread keeps its core until the system preempts it

    @jit.njit(nogil=True)
    def yield_core():  # type: ignore[no-untyped-def]
        """Do nothing."""
        return 0

    _ticks: Any = types.ExternalFunction("GetTickCount64", _int64())

    @jit.njit(nogil=True)
    def milliseconds():  # type: ignore[no-untyped-def]
        """Return the time of a monotonic clock."""
        return _ticks()


@jit.njit(nogil=True)
def relax(turn):  # type: ignore[no-untyped-def]
    """Pause, and every 256th time (7 us) yield the core to a thread that waits for it.

    With a core for each thread this costs nothing; on a busy machine the thread that is waited for
    may need this very core (2 replicas beside another program: a step took 3.3 ms without it).
    """
    pause()
    if turn & 255 == 255:
        yield_core()
