"""Threads that enter Numba's workqueue take turns; see kernels/threading_layer.py.

words: [0] whether somebody is inside   [8 + k] which thread worker k is
"""

from __future__ import annotations

import ctypes
import importlib
import os
from typing import Any

import llvmlite.binding as llvm
from numba import config, types

from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import intrinsics

__all__ = ["take_turns"]

_queue: Any = importlib.import_module("numba.np.ufunc.workqueue")
_config: Any = config
_NUM_WORKERS = int(_config.NUMBA_NUM_THREADS)
_words = intrinsics.words(8 + _NUM_WORKERS)
_ADDRESS = checks.address(_words)

_int64: Any = types.int64
_void: Any = types.void
_KIND = _void(*[_int64] * 7, types.int32)  # what to run, on what, how often, by how many
_enter: Any = types.ExternalFunction("dvkernels_enter_workqueue", _KIND)
_this_thread: Any = types.ExternalFunction(
    "pthread_self" if os.name == "posix" else "GetCurrentThreadId", _int64()
)


def take_turns() -> None:
    """Put a turnstile before the workqueue, for functions that are compiled from now on."""
    llvm.add_symbol("dvkernels_enter_workqueue", _queue.parallel_for)

    @jit.cfunc(_void(*[_int64] * 4), cache=False)
    def sign(place, _, __, ___):  # type: ignore[no-untyped-def]
        intrinsics.store(place, 0, _this_thread())

    @jit.cfunc(_KIND, cache=False)
    def enter(function, arguments, lengths, steps, data, num_dims, num_arrays, num_threads):  # type: ignore[no-untyped-def]
        turn = 0
        is_worker = False
        while not is_worker and intrinsics.compare_exchange(_ADDRESS, 0, 0, 1) != 0:
            if turn == 0:
                for k in range(_NUM_WORKERS):
                    is_worker = is_worker or intrinsics.load(_ADDRESS, 8 + k) == _this_thread()
            intrinsics.relax(turn)
            turn += 1
        _enter(function, arguments, lengths, steps, data, num_dims, num_arrays, num_threads)
        intrinsics.store_shared(_ADDRESS, 0, 0)

    _have_workers_sign(sign.address)
    llvm.add_symbol("numba_parallel_for", enter.address)
    _kept.extend((sign, enter))
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_leave)


def _have_workers_sign(address: int) -> None:
    """Learn which threads the workers are: each takes one task."""
    add_task = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5)(_queue.add_task)
    for k in range(_NUM_WORKERS):
        add_task(address, _ADDRESS + 8 * (8 + k), None, None, None)
    ctypes.CFUNCTYPE(None)(_queue.ready)()
    ctypes.CFUNCTYPE(None)(_queue.synchronize)()


def _leave() -> None:
    """Forget who was inside: a fork left that thread in the parent."""
    _words[0] = 0


_kept: list[Any] = []  # alive for as long as the functions that call them
