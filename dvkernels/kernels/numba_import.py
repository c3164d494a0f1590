"""Numba is loaded where no interrupt finds it half imported, and no fork finds it at work.

An interrupt in the midst of an import leaves a package that can never be imported again. A child
that is forked while another thread imports or compiles inherits that thread's locks, which nobody
there will ever release. So a fork waits for both, also where the other thread is the user's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging  # noqa: F401 - it holds its lock during a fork: from after ours on, see below
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
    """Return a module, imported now if it has not been."""
    return shielded.beyond_interrupts(_imported, name)


def _imported(name: str) -> Any:
    with _importing:
        found = importlib.import_module(name)
        threading_layer.guard()
        return found


def _locks() -> list[Any]:
    """Return what a thread may hold that loads or compiles, in the order in which it takes them."""
    compiling = sys.modules.get("numba.core.compiler_lock")
    llvm = getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None)
    holders: tuple[Any, ...] = (
        getattr(compiling, "global_compiler_lock", None),
        getattr(llvm, "_lock", None),
    )
    return [_importing, *(holder._lock for holder in holders if hasattr(holder, "_lock"))]


def _wait_for_others() -> None:
    """Hold, before a fork, all that a child could not do without."""
    patience = deadlines.timeout_seconds()
    _importing.acquire(timeout=patience)
    if "numba" in sys.modules:  # perhaps half of it, by a thread of the user's
        with contextlib.suppress(Exception):
            importlib.import_module("numba")
    for lock in _locks()[1:]:
        lock.acquire(timeout=patience)


def _go_on() -> None:
    for lock in reversed(_locks()):
        with contextlib.suppress(RuntimeError):  # not taken in time
            lock.release()


# The latest registered comes first: these locks are waited for before that of logging is held,
# which a thread that imports or compiles may need to go on.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_others, after_in_parent=_go_on, after_in_child=_go_on)

if "numba.np.ufunc.parallel" in sys.modules:  # before the first parallel function is compiled
    threading_layer.guard()
