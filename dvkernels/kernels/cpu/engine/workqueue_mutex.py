"""Mutex before Numba's workqueue, which one thread may enter at a time.

kernels/threading_layer.py says why.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from numba import config, types

from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import intrinsics, records

__all__: list[str] = []

_queue: Any = importlib.import_module("numba.np.ufunc.workqueue")
_config: Any = config
_NUM_WORKERS = int(_config.NUMBA_NUM_THREADS)


class _Mutex(NamedTuple):
    is_taken: int


# The words: the mutex, on a cache line of its own, then the thread of each worker.
_MUTEX = records.layout(_Mutex, nbytes=records.LINE_NBYTES)
_mutex_at = records.view(_MUTEX)
_words = intrinsics.words(_MUTEX.itemsize // 8 + _NUM_WORKERS)
_ADDRESS = checks.address(_words)
_WORKERS = _ADDRESS + _MUTEX.itemsize

_int64: Any = types.int64
_void: Any = types.void
_SIGNATURE = _void(*[_int64] * 7, types.int32)  # of numba_parallel_for
_parallel_for: Any = types.ExternalFunction("dvkernels_enter_workqueue", _SIGNATURE)
_this_thread: Any = types.ExternalFunction(
    "pthread_self" if os.name == "posix" else "GetCurrentThreadId", _int64()
)


def install() -> None:
    """Install the mutex before the workqueue, for functions that are compiled from now on."""
    llvm.add_symbol("dvkernels_enter_workqueue", _queue.parallel_for)

    @jit.cfunc(_void(*[_int64] * 4), cache=False)
    def register_worker(slot, _, __, ___):  # type: ignore[no-untyped-def]
        intrinsics.store(slot, 0, _this_thread())

    @jit.cfunc(_SIGNATURE, cache=False)
    def enter(function, arguments, lengths, steps, data, num_dims, num_arrays, num_threads):  # type: ignore[no-untyped-def]
        mutex = _mutex_at(_ADDRESS)
        spin = 0
        is_worker = False
        while not is_worker and intrinsics.compare_exchange(mutex, "is_taken", 0, 1) != 0:
            if spin == 0:
                for k in range(_NUM_WORKERS):
                    is_worker = is_worker or intrinsics.load(_WORKERS, k) == _this_thread()
            intrinsics.relax(spin)
            spin += 1
        _parallel_for(function, arguments, lengths, steps, data, num_dims, num_arrays, num_threads)
        intrinsics.store_shared(mutex, "is_taken", 0)

    _register_workers(register_worker.address)
    llvm.add_symbol("numba_parallel_for", enter.address)
    _kept.extend((register_worker, enter))
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_release_after_fork)


def _register_workers(address: int) -> None:
    """Record the workers' threads: each worker runs one task, which stores its thread."""
    add_task = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5)(_queue.add_task)
    for k in range(_NUM_WORKERS):
        add_task(address, _WORKERS + 8 * k, None, None, None)
    ctypes.CFUNCTYPE(None)(_queue.ready)()
    ctypes.CFUNCTYPE(None)(_queue.synchronize)()


def _release_after_fork() -> None:
    """Release the mutex in a forked child: the thread that held it is in the parent."""
    _words[0] = 0


_kept: list[Any] = []  # C functions, kept alive for the compiled functions that call them
