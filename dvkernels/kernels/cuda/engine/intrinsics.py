"""What compiled CUDA code does with raw memory, and the plain twin of each for the simulator.

Addresses and words are int64, so that tables of them need one type and nothing turns into a float
(Numba adds an int64 to a uint64 in float64). ``load_word(table, 3)`` reads the word 24 bytes past
``table``. A vector is 16 bytes at a multiple of 16, four uint32: one LDG.E.128 or STG.E.128.

Flags between GPUs need the scope of the system: ``cuda.atomic`` reaches its own device only, and a
plain load in a spin is hoisted out of the loop. So these are written in PTX: ``acquire`` sees what
was written before the ``release`` that it reads.

The simulator runs kernels as Python and knows no intrinsics; there an address is one of the host.
``_twin`` is the one place where either is chosen.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import config as numba_config
from numba import extending, types

__all__ = [
    "GLOBAL",
    "SIMULATED",
    "VECTOR",
    "VECTOR_NBYTES",
    "acquire",
    "add_release",
    "assemble",
    "call",
    "clock_ns",
    "gather",
    "keep_rolled",
    "load_relaxed",
    "load_vector",
    "load_whole",
    "load_word",
    "nanosleep",
    "pointer",
    "quotient",
    "release",
    "spread",
    "store_relaxed",
    "store_vector",
    "store_whole",
    "store_word",
    "twin",
]

SIMULATED = bool(vars(numba_config)["ENABLE_CUDASIM"])
VECTOR_NBYTES = 16

_I32, _I64 = ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(_I32, 4)
_untyped: Any = types
_FOUR = _untyped.UniTuple(types.uint32, 4)
GLOBAL = 1  # the address space of device memory: without it LLVM makes generic accesses

_Emit = Callable[..., Any]
# Where several simulated threads add to one word: Python has no atomic addition.
_adding = threading.Lock()


def twin(plain: Callable[..., Any], *, prefer_literal: bool = False) -> Callable[[_Emit], Any]:
    """Return a decorator: on a device, what the function emits; in the simulator, ``plain``."""

    def choose(emit: _Emit) -> Any:
        if SIMULATED:
            return plain
        return extending.intrinsic(prefer_literal=prefer_literal)(emit)

    return choose


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """Emit an address as a pointer to ``kind`` in device memory."""
    return builder.inttoptr(address, ir.PointerType(kind, addrspace=GLOBAL))


def _nth_word(builder: Any, args: Any) -> Any:
    """Emit the pointer to word ``args[1]`` after the address ``args[0]``."""
    return builder.gep(pointer(builder, args[0], _I64), [args[1]])


def assemble(builder: Any, result: Any, code: str, constraints: str, args: Sequence[Any]) -> Any:
    """Emit PTX that memory accesses do not pass: ``result`` is its LLVM type."""
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.asm(function, code, constraints, list(args), side_effect=True)


def gather(builder: Any, numbers: Sequence[Any]) -> Any:
    """Emit the vector of some numbers."""
    vector = ir.Constant(ir.VectorType(numbers[0].type, len(numbers)), ir.Undefined)
    for k, number in enumerate(numbers):
        vector = builder.insert_element(vector, number, _I32(k))
    return vector


def spread(builder: Any, vector: Any) -> list[Any]:
    """Emit the numbers of a vector."""
    return [builder.extract_element(vector, _I32(k)) for k in range(vector.type.count)]


def call(builder: Any, name: str, result: Any, args: Sequence[Any]) -> Any:
    """Emit the call of a function of LLVM or NVVM."""
    declared = builder.module.globals.get(name)
    if declared is None:
        kind = ir.FunctionType(result, [arg.type for arg in args])
        declared = ir.Function(builder.module, kind, name)
    return builder.call(declared, args)


def keep_rolled(builder: Any) -> None:
    """Keep LLVM from unrolling the loop around this place.

    A GPU hides latency by having other warps run, which needs room for them: unrolled by LLVM, the
    minimum of int8 took 152 registers on sm_90, the sum of float16 as many as 128; so 84 and 96.
    """
    empty = builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], side_effect=True)
    empty.attributes.add("convergent")


def load_whole(builder: Any, address: Any) -> Any:
    """Emit the load of a vector, four 32-bit integers.

    In PTX, because LLVM splits the loads of vectors of small numbers: eight float16 into two,
    sixteen int8 into four.
    """
    keep_rolled(builder)
    four = ir.LiteralStructType([_I32] * 4)
    code = "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    loaded = assemble(builder, four, code, "=r,=r,=r,=r,l", [address])
    return gather(builder, [builder.extract_value(loaded, k) for k in range(4)])


def store_whole(builder: Any, address: Any, value: Any) -> Any:
    """Emit the store of a vector of 16 bytes, and return it."""
    keep_rolled(builder)
    lanes = spread(builder, builder.bitcast(value, VECTOR))
    code = "st.global.v4.b32 [$0], {$1, $2, $3, $4};"
    return assemble(builder, ir.VoidType(), code, "l,r,r,r,r,~{memory}", [address, *lanes])


# ------------------------------------------------------------------ words and vectors


def _load_word(address: int, index: int) -> int:
    return ctypes.c_int64.from_address(address + 8 * index).value


def _store_word(address: int, index: int, value: int) -> None:
    ctypes.c_int64.from_address(address + 8 * index).value = value


_Vector = ctypes.c_uint32 * 4


def _load_vector(address: int) -> tuple[int, ...]:
    _check_aligned(address)
    return tuple(_Vector.from_address(address))


def _store_vector(address: int, vector: Sequence[int]) -> None:
    _check_aligned(address)
    _Vector.from_address(address)[:] = list(vector)


def _check_aligned(address: int) -> None:
    """Raise where a device would: an access of 16 bytes at another address is an error there."""
    if address % VECTOR_NBYTES:
        raise ValueError(f"16 bytes at {address:#x}, which is no multiple of 16")


@twin(_load_word)
def load_word(typing: Any, address: Any, index: Any) -> Any:
    """Read a word."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_nth_word(builder, args), align=8)

    return types.int64(types.int64, types.int64), generate


@twin(_store_word)
def store_word(typing: Any, address: Any, index: Any, value: Any) -> Any:
    """Write a word."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _nth_word(builder, args), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@twin(_load_vector)
def load_vector(typing: Any, address: Any) -> Any:
    """Read 16 bytes at a multiple of 16, in one access."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = spread(builder, load_whole(builder, args[0]))
        return context.make_tuple(builder, _FOUR, lanes)

    return _FOUR(types.int64), generate


@twin(_store_vector)
def store_vector(typing: Any, address: Any, vector: Any) -> Any:
    """Write 16 bytes at a multiple of 16, in one access."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = [builder.extract_value(args[1], k) for k in range(4)]
        store_whole(builder, args[0], gather(builder, lanes))
        return context.get_dummy_value()

    return types.void(types.int64, _FOUR), generate


def _quotient(dividend: int, divisor: int) -> int:
    return dividend // divisor


@twin(_quotient)
def quotient(typing: Any, dividend: Any, divisor: Any) -> Any:
    """Divide positive numbers below 2**32: a third of the instructions of 64 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        keep_rolled(builder)
        short = [builder.trunc(arg, _I32) for arg in args]
        return builder.zext(builder.udiv(*short), _I64)

    return types.int64(types.int64, types.int64), generate


# ------------------------------------------------------------------ flags that other GPUs read


def _load_flag(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _store_flag(address: int, value: int) -> None:
    ctypes.c_int64.from_address(address).value = value


def _add_to_flag(address: int, value: int) -> None:
    with _adding:
        ctypes.c_int64.from_address(address).value += value


def _loads(code: str) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return assemble(builder, _I64, f"{code} $0, [$1];", "=l,l,~{memory}", args)

    return types.int64(types.int64), generate


def _writes(code: str) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        assemble(builder, ir.VoidType(), f"{code} [$0], $1;", "l,l,~{memory}", args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@twin(_load_flag)
def acquire(typing: Any, address: Any) -> Any:
    """Read a flag; what was written before the release that set it can be read from here on."""
    return _loads("ld.acquire.sys.global.b64")


@twin(_load_flag)
def load_relaxed(typing: Any, address: Any) -> Any:
    """Read a word that other GPUs, or the host, write; it orders nothing else."""
    return _loads("ld.relaxed.sys.global.b64")


@twin(_store_flag)
def release(typing: Any, address: Any, value: Any) -> Any:
    """Set a flag, after all that this thread has written, and has acquired."""
    return _writes("st.release.sys.global.b64")


@twin(_store_flag)
def store_relaxed(typing: Any, address: Any, value: Any) -> Any:
    """Write a word that other GPUs, or the host, read; it orders nothing else."""
    return _writes("st.relaxed.sys.global.b64")


@twin(_add_to_flag)
def add_release(typing: Any, address: Any, value: Any) -> Any:
    """Add to a flag, atomically, after all that this thread has written, and has acquired."""
    return _writes("red.release.sys.global.add.u64")


# ------------------------------------------------------------------ time


def _sleep(nanoseconds: int) -> None:
    time.sleep(nanoseconds * 1e-9)


@twin(_sleep)
def nanosleep(typing: Any, nanoseconds: Any) -> Any:
    """Let other warps run for about so long, at most a millisecond."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        short = builder.trunc(args[0], _I32)
        assemble(builder, ir.VoidType(), "nanosleep.u32 $0;", "r,~{memory}", [short])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@twin(time.monotonic_ns)
def clock_ns(typing: Any) -> Any:
    """Return the nanoseconds of a clock that only goes forward; its steps may be a microsecond."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return assemble(builder, _I64, "mov.u64 $0, %globaltimer;", "=l,~{memory}", [])

    return types.int64(), generate
