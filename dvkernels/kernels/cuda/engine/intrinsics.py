"""Intrinsics of the CUDA kernels: flags that other GPUs read, a clock, short divisions.

Addresses and words are int64, so that tables of them need one type and no expression becomes a
float (Numba adds an int64 to a uint64 in float64). A vector is 16 bytes at a multiple of 16, four
uint32: one LDG.E.128 or STG.E.128.

Flags between GPUs need system scope: ``cuda.atomic`` has device scope, and a plain load in a spin
loop is hoisted out of it. So flags are accessed in PTX: after an ``acquire`` that reads the value
of a ``release``, everything written before that release is visible.
"""

from __future__ import annotations

import ctypes
import operator
import time

from numba import types

from dvkernels.kernels.cuda.engine import simulator
from dvkernels.kernels.cuda.engine.cuda_target import cuda
from dvkernels.kernels.cuda.engine.inline_ptx import READS, Code, device_function

__all__ = [
    "acquire",
    "clock_ns",
    "inlined",
    "load_relaxed",
    "nanosleep",
    "quotient",
    "read_word",
    "release",
    "short_quotient",
    "store_relaxed",
]

# Decorator of device functions. Made here, since the simulator replaces the name ``cuda`` in the
# module of a kernel while it runs, and another thread may make a kernel at that time.
inlined = cuda.jit(device=True, inline="always")


def _load(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _store(address: int, value: int) -> None:
    ctypes.c_int64.from_address(address).value = value


_READ = types.int64, [types.int64]
_WRITE = types.void, [types.int64, types.int64]

# Read a word of a table in shared or device memory, which nobody writes during the launch.
read_word = device_function(Code("ld.b64 $0, [$1];", *_READ), _load, READS)
# Read a flag; from here on, writes before the release that set it are visible.
acquire = device_function(Code("ld.acquire.sys.global.b64 $0, [$1];", *_READ), _load)
# Read a word that other GPUs, or the host, write; orders no other access.
load_relaxed = device_function(Code("ld.relaxed.sys.global.b64 $0, [$1];", *_READ), _load)
# Set a flag after everything that this thread has written or acquired.
release = device_function(Code("st.release.sys.global.b64 [$0], $1;", *_WRITE), _store)
# Write a word that other GPUs, or the host, read; orders no other access.
store_relaxed = device_function(Code("st.relaxed.sys.global.b64 [$0], $1;", *_WRITE), _store)
# Suspend this thread for about that many nanoseconds, at most a millisecond.
nanosleep = device_function(
    Code("nanosleep.u32 $0;", operands=[types.uint32]),
    lambda nanoseconds: time.sleep(nanoseconds * 1e-9),
)
# Return the nanoseconds of a monotonic clock; its resolution may be a microsecond.
clock_ns = device_function(Code("mov.u64 $0, %globaltimer;", types.int64), time.monotonic_ns)
short_quotient = device_function(
    Code("div.u32 $0, $1, $2;", types.uint32, [types.uint32, types.uint32]), operator.floordiv
)
_int64 = int if simulator.IS_ON else types.int64


@inlined
def quotient(dividend, divisor):  # type: ignore[no-untyped-def]
    """Divide positive integers below 2**32, in a third of the instructions of a 64-bit division."""
    return _int64(short_quotient(dividend, divisor))
