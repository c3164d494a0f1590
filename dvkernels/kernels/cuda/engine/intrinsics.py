"""Intrinsics of the CUDA kernels (memory accesses, flags, clock), with simulator twins.

Addresses and words are int64, so that tables of them need one type and no expression becomes a
float (Numba adds an int64 to a uint64 in float64). A vector is 16 bytes at a multiple of 16, four
uint32: one LDG.E.128 or STG.E.128.

Flags between GPUs need system scope: ``cuda.atomic`` has device scope, and a plain load in a spin
loop is hoisted out of it. So flags are accessed in PTX: after an ``acquire`` that reads the value
of a ``release``, everything written before that release is visible.

The simulator runs kernels as Python and has no intrinsics; addresses there are host addresses.
:func:`twin` chooses between the two implementations.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import config as numba_config
from numba import extending, types

from dvkernels.kernels.cuda.engine import table_layout
from dvkernels.kernels.cuda.engine.cuda_target import cuda

__all__ = [
    "GLOBAL",
    "SIMULATED",
    "VECTOR",
    "VECTOR_NBYTES",
    "acquire",
    "call",
    "clock_ns",
    "emit_vector_load",
    "emit_vector_store",
    "inline_ptx",
    "inlined",
    "keep_rolled",
    "load_relaxed",
    "nanosleep",
    "pack",
    "pointer",
    "quotient",
    "release",
    "store_relaxed",
    "twin",
    "unpack",
]

SIMULATED = bool(vars(numba_config)["ENABLE_CUDASIM"])
VECTOR_NBYTES = table_layout.VECTOR_NBYTES

_I32, _I64 = ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(_I32, 4)
GLOBAL = 1  # the address space of device memory: without it LLVM emits generic accesses

_Emit = Callable[..., Any]

# Decorator of device functions. Made here, since the simulator replaces the name ``cuda`` in the
# module of a kernel while it runs, and another thread may make a kernel at that time.
inlined = cuda.jit(device=True, inline="always")


def twin(simulated: Callable[..., Any], *, prefer_literal: bool = False) -> Callable[[_Emit], Any]:
    """Return a decorator that makes an emitter an intrinsic; in the simulator, ``simulated``."""

    def choose(emit: _Emit) -> Any:
        if SIMULATED:
            return simulated
        return extending.intrinsic(prefer_literal=prefer_literal)(emit)

    return choose


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """Emit an address as a pointer to ``kind`` in device memory."""
    return builder.inttoptr(address, ir.PointerType(kind, addrspace=GLOBAL))


def inline_ptx(builder: Any, result: Any, code: str, constraints: str, args: Sequence[Any]) -> Any:
    """Emit inline PTX of LLVM type ``result``, across which no memory access is moved."""
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.asm(function, code, constraints, list(args), side_effect=True)


def pack(builder: Any, numbers: Sequence[Any]) -> Any:
    """Emit the vector of these numbers."""
    vector = ir.Constant(ir.VectorType(numbers[0].type, len(numbers)), ir.Undefined)
    for k, number in enumerate(numbers):
        vector = builder.insert_element(vector, number, _I32(k))
    return vector


def unpack(builder: Any, vector: Any) -> list[Any]:
    """Emit the numbers of a vector."""
    return [builder.extract_element(vector, _I32(k)) for k in range(vector.type.count)]


def call(builder: Any, name: str, result: Any, args: Sequence[Any]) -> Any:
    """Emit the call of an LLVM or NVVM function."""
    declared = builder.module.globals.get(name)
    if declared is None:
        kind = ir.FunctionType(result, [arg.type for arg in args])
        declared = ir.Function(builder.module, kind, name)
    return builder.call(declared, args)


def keep_rolled(builder: Any) -> None:
    """Keep LLVM and ptxas from unrolling the loop around the current position.

    A GPU hides latency by running other warps, which need registers: unrolled by LLVM, the minimum
    of int8 took 152 registers per thread on sm_90 and the sum of float16 128; rolled, 84 and 96.
    """
    text = r".pragma \22nounroll\22;"  # for ptxas; LLVM does not copy what is convergent
    empty = builder.asm(ir.FunctionType(ir.VoidType(), []), text, "", [], side_effect=True)
    empty.attributes.add("convergent")


def emit_vector_load(builder: Any, address: Any) -> Any:
    """Emit the load of a vector, four 32-bit integers.

    In PTX, because LLVM splits loads of vectors of small numbers: eight float16 into two loads,
    sixteen int8 into four.
    """
    keep_rolled(builder)
    four = ir.LiteralStructType([_I32] * 4)
    code = "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    loaded = inline_ptx(builder, four, code, "=r,=r,=r,=r,l", [address])
    return pack(builder, [builder.extract_value(loaded, k) for k in range(4)])


def emit_vector_store(builder: Any, address: Any, value: Any) -> Any:
    """Emit the store of a vector of 16 bytes, and return the instruction."""
    keep_rolled(builder)
    lanes = unpack(builder, builder.bitcast(value, VECTOR))
    code = "st.global.v4.b32 [$0], {$1, $2, $3, $4};"
    return inline_ptx(builder, ir.VoidType(), code, "l,r,r,r,r,~{memory}", [address, *lanes])


def _simulated_quotient(dividend: int, divisor: int) -> int:
    return dividend // divisor


@twin(_simulated_quotient)
def quotient(typing: Any, dividend: Any, divisor: Any) -> Any:
    """Divide positive integers below 2**32, in a third of the instructions of a 64-bit division."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        keep_rolled(builder)
        short = [builder.trunc(arg, _I32) for arg in args]
        return builder.zext(builder.udiv(*short), _I64)

    return types.int64(types.int64, types.int64), generate


# ------------------------------------------------------------------ flags that other GPUs read


def _simulated_load_flag(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _simulated_store_flag(address: int, value: int) -> None:
    ctypes.c_int64.from_address(address).value = value


def _flag_load(code: str) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return inline_ptx(builder, _I64, f"{code} $0, [$1];", "=l,l,~{memory}", args)

    return types.int64(types.int64), generate


def _flag_store(code: str) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        inline_ptx(builder, ir.VoidType(), f"{code} [$0], $1;", "l,l,~{memory}", args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@twin(_simulated_load_flag)
def acquire(typing: Any, address: Any) -> Any:
    """Read a flag; from here on, writes before the release that set it are visible."""
    return _flag_load("ld.acquire.sys.global.b64")


@twin(_simulated_load_flag)
def load_relaxed(typing: Any, address: Any) -> Any:
    """Read a word that other GPUs, or the host, write; orders no other access."""
    return _flag_load("ld.relaxed.sys.global.b64")


@twin(_simulated_store_flag)
def release(typing: Any, address: Any, value: Any) -> Any:
    """Set a flag after everything that this thread has written or acquired."""
    return _flag_store("st.release.sys.global.b64")


@twin(_simulated_store_flag)
def store_relaxed(typing: Any, address: Any, value: Any) -> Any:
    """Write a word that other GPUs, or the host, read; orders no other access."""
    return _flag_store("st.relaxed.sys.global.b64")


# ------------------------------------------------------------------ time


def _simulated_sleep(nanoseconds: int) -> None:
    time.sleep(nanoseconds * 1e-9)


@twin(_simulated_sleep)
def nanosleep(typing: Any, nanoseconds: Any) -> Any:
    """Suspend this thread for about that many nanoseconds, at most a millisecond."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        short = builder.trunc(args[0], _I32)
        inline_ptx(builder, ir.VoidType(), "nanosleep.u32 $0;", "r,~{memory}", [short])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@twin(time.monotonic_ns)
def clock_ns(typing: Any) -> Any:
    """Return the nanoseconds of a monotonic clock; its resolution may be a microsecond."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return inline_ptx(builder, _I64, "mov.u64 $0, %globaltimer;", "=l,~{memory}", [])

    return types.int64(), generate
