"""Import of Numba, safe from interrupts and forks.

An interrupt in the midst of an import leaves a package that can never be imported again. A child
process forked while another thread imports or compiles inherits that thread's locks, which nothing
in the child ever releases. So a fork waits for both, also where the other thread is the user's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging  # noqa: F401 - its fork hook must be registered before ours, see below
import os
import sys
import threading
from typing import Any

from dvkernels import deadlines
from dvkernels.kernels import threading_layer
from dvkernels.threads import shielded

__all__ = ["module"]

_importing = threading.RLock()


@functools.cache
def module(name: str) -> Any:
    """Import and return a module, on a thread that no interrupt reaches."""
    return shielded.beyond_interrupts(_import, name)


def _import(name: str) -> Any:
    with _importing:
        found = importlib.import_module(name)
        if "numba" in sys.modules:
            threading_layer.guard()
        return found


def _locks() -> list[Any]:
    """Return the locks of a thread that imports or compiles, in the order of acquisition."""
    compiling = sys.modules.get("numba.core.compiler_lock")
    llvm = getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None)
    holders: tuple[Any, ...] = (
        getattr(compiling, "global_compiler_lock", None),
        getattr(llvm, "_lock", None),
    )
    return [_importing, *(holder._lock for holder in holders if hasattr(holder, "_lock"))]


def _acquire_locks() -> None:
    """Acquire, before a fork, the locks that a child could not release."""
    timeout = deadlines.timeout_seconds()
    _importing.acquire(timeout=timeout)
    if "numba" in sys.modules:  # perhaps half imported, by a thread of the user's
        with contextlib.suppress(Exception):
            importlib.import_module("numba")
    for lock in _locks()[1:]:
        lock.acquire(timeout=timeout)


def _release_locks() -> None:
    for lock in reversed(_locks()):
        with contextlib.suppress(RuntimeError):  # not taken in time
            lock.release()


# Hooks before a fork run in reverse order of registration: these locks are acquired before that of
# logging, which a thread that imports or compiles may need to go on.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_acquire_locks, after_in_parent=_release_locks, after_in_child=_release_locks
    )

if "numba.np.ufunc.parallel" in sys.modules:  # before the first parallel function is compiled
    threading_layer.guard()
