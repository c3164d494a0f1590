"""The memory limit, measured: what reading and writing so many bytes takes at least.

R buffers, each element read once and written once in place: the traffic of an in-place all-reduce,
without any sum. Beside another collective they take together as much memory as its buffers and
results do, so that both live in the same caches, and the rates are compared: bytes read or written
a second. There are two orders, one buffer after another and all in step, on one core or on all;
the fastest of them is the limit.

The threads that help are parked before the time is taken: each spins within one compiled call, and
starts when the first one opens the gate.
"""

from __future__ import annotations

import itertools
import os
import platform
import threading
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types

from dvkernels.benchmarks.stopwatch import Contestant
from dvkernels.devices import cpu

__all__: list[str] = []

STEP = 128  # bytes incremented at a time: two vectors of 64

_READY, _GO, _DONE = 0, 1, 2  # counters, each on a cache line of its own
_SLOT = 8
_MAX_PAUSES = 1 << 31  # about a minute: a helper that died is an error, not a hang
_HAS_PAUSE = platform.machine() in ("x86_64", "AMD64")
_I64 = ir.IntType(64)
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_intrinsic: _Decorator = extending.intrinsic


@_intrinsic
def _increment(typing: Any, address: Any) -> Any:
    """Add 1 to each int64 of the ``STEP`` bytes from an address on, which it divides."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(_I64, 8)
        first = builder.inttoptr(args[0], vector.as_pointer())
        for k in range(STEP // 64):
            place = builder.gep(first, [ir.Constant(_I64, k)])
            value = builder.load(place, align=64)
            builder.store(builder.add(value, ir.Constant(vector, [1] * 8)), place, align=64)
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _slot(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [builder.mul(args[1], ir.Constant(_I64, _SLOT))])


@_intrinsic
def _count(typing: Any, state: Any, counter: Any) -> Any:
    """Add 1 to a counter."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        slot = _slot(context, builder, signature, args)
        return builder.atomic_rmw("add", slot, ir.Constant(_I64, 1), "seq_cst")

    return types.int64(state, types.int64), generate


@_intrinsic
def _load(typing: Any, state: Any, counter: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_slot(context, builder, signature, args), "acquire", 8)

    return types.int64(state, types.int64), generate


@_intrinsic
def _pause(typing: Any) -> Any:
    """Tell the core that this is a spin; where it has no such instruction, do nothing."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_PAUSE:
            function_type = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            pause = builder.module.globals.get(name)
            builder.call(pause or ir.Function(builder.module, function_type, name), [])
        return context.get_dummy_value()

    return types.void(), generate


if os.name == "posix":
    _yield_core = types.ExternalFunction("sched_yield", types.intc())
else:

    @numba.njit(nogil=True, cache=True)
    def _yield_core():  # type: ignore[no-untyped-def]
        return 0


@numba.njit(nogil=True, cache=True)
def _await(state, counter, value):  # type: ignore[no-untyped-def]
    """Spin until a counter has a value; False if that never comes."""
    for turn in range(_MAX_PAUSES):
        if _load(state, np.int64(counter)) >= value:
            return True
        _pause()
        if turn & 255 == 255:
            _yield_core()
    return False


@numba.njit(nogil=True, cache=True)
def _pass(addresses, start, stop, in_step, num_passes):  # type: ignore[no-untyped-def]
    for _ in range(num_passes):
        if in_step:
            for offset in range(start, stop, STEP):
                for k in range(addresses.size):
                    _increment(addresses[k] + offset)
        else:
            for k in range(addresses.size):
                for place in range(addresses[k] + start, addresses[k] + stop, STEP):
                    _increment(place)


@numba.njit(nogil=True, cache=True)
def _help(state, addresses, start, stop, in_step, num_passes):  # type: ignore[no-untyped-def]
    _count(state, np.int64(_READY))
    if _await(state, _GO, 1):
        _pass(addresses, start, stop, in_step, num_passes)
        _count(state, np.int64(_DONE))


@numba.njit(nogil=True, cache=True)
def _lead(  # type: ignore[no-untyped-def]
    state, addresses, start, stop, in_step, num_passes, num_helpers
):
    _count(state, np.int64(_GO))
    _pass(addresses, start, stop, in_step, num_passes)
    return _await(state, _DONE, num_helpers)


class Probe:
    """Buffers of ``nbytes`` together, and threads to go over them. Close it after use."""

    def __init__(self, num_buffers: int, nbytes: int) -> None:
        num_steps = max(1, round(nbytes / (num_buffers * STEP)))
        self._num_steps = num_steps
        self._buffers = [np.ones(num_steps * STEP // 8 + 8, np.int64) for _ in range(num_buffers)]
        self._addresses = np.array([-(-b.ctypes.data // 64) * 64 for b in self._buffers])
        room = np.zeros(4 * _SLOT, np.int64)
        self._state = room[-room.ctypes.data % 64 // 8 :][: 3 * _SLOT]
        self._num_cores = cpu.usable_cores()
        self._work: tuple[Any, ...] | None = None
        self._wake = threading.Semaphore(0)
        self._asleep = threading.Semaphore(0)
        self._shares: list[tuple[int, int]] = []
        self._helpers = [
            threading.Thread(target=self._serve, args=(k,), name="dvkernels-probe", daemon=True)
            for k in range(self._num_cores - 1)
        ]
        for helper in self._helpers:
            helper.start()

    @property
    def moved_bytes(self) -> int:
        """What one pass reads and writes."""
        return 2 * len(self._buffers) * self._num_steps * STEP

    def contestants(self) -> dict[str, Contestant]:
        """Return both orders on one core and on all."""
        found = {}
        for num_threads in sorted({1, self._num_cores}):
            for in_step, order in ((False, "one after another"), (True, "in step")):
                name = f"probe, {order}, threads {num_threads}"
                found[name] = Contestant(self._runner(in_step, num_threads))
        return found

    def _runner(self, in_step: bool, num_threads: int) -> Callable[[int], float]:
        return lambda num_passes: self.seconds(num_passes, in_step, num_threads)

    def seconds(self, num_passes: int, in_step: bool, num_threads: int) -> float:
        """Time some passes over all buffers, every thread over its contiguous share of each."""
        edges = [self._num_steps * k // num_threads * STEP for k in range(num_threads + 1)]
        self._shares = list(itertools.pairwise(edges))
        state, num_helpers = self._state, num_threads - 1
        state[:] = 0
        self._work = (in_step, num_passes)
        _lead(state, self._addresses, 0, 0, in_step, 0, 0)  # compiles, before anyone spins
        state[:] = 0
        # A helper that this round has no share for is not woken.
        for _ in range(num_helpers):
            self._wake.release()
        if not _await(state, _READY, num_helpers):
            raise RuntimeError("the probe's threads did not start")
        start, stop = self._shares[0]
        began = time.perf_counter()
        in_time = _lead(state, self._addresses, start, stop, in_step, num_passes, num_helpers)
        seconds = time.perf_counter() - began
        if not in_time:
            raise RuntimeError("the probe's threads did not finish")
        for _ in range(num_helpers):
            self._asleep.acquire()
        return seconds

    def _serve(self, number: int) -> None:
        while True:
            self._wake.acquire()
            if self._work is None:
                return
            in_step, num_passes = self._work
            start, stop = self._shares[number + 1]
            _help(self._state, self._addresses, start, stop, in_step, num_passes)
            self._asleep.release()

    def close(self) -> None:
        """End the threads."""
        self._work = None
        for _ in self._helpers:
            self._wake.release()
        for helper in self._helpers:
            helper.join()
        self._helpers = []

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
