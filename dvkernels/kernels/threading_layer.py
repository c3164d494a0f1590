"""Numba's threading layer under users' parallel functions (``numba.njit(parallel=True)``).

Where Numba finds neither TBB nor OpenMP it falls back to its workqueue, which ends the process when
two threads enter it, as replicas do. So a mutex lets them enter one at a time. A parallel function
inside another one is left to Numba, which refuses it with a message of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["guard", "layer"]

# Called on a thread that has asked Numba for its threads, each time.
after_launch: list[Callable[[], object]] = []


def guard() -> None:
    """Install the mutex of the workqueue, for parallel functions compiled from now on."""
    numba_parallel = importlib.import_module("numba.np.ufunc.parallel")
    launch = numba_parallel._launch_threads
    if getattr(launch, "is_guarded", False):
        return

    def launch_guarded() -> None:
        is_first = not numba_parallel._is_initialized
        launch()
        if is_first and numba_parallel._threading_layer == "workqueue":
            # Imported here: it is compiled, and most programs have another layer.
            importlib.import_module("dvkernels.kernels.cpu.engine.workqueue_mutex").install()
        for follow in after_launch:
            follow()

    launch_guarded.is_guarded = True  # type: ignore[attr-defined]
    vars(numba_parallel)["_launch_threads"] = launch_guarded


def functions_of_thread() -> tuple[Any, ...] | None:
    """Return functions to get and set the threads of Numba on the calling thread.

    None before Numba has started its threads: asking it would start them. The functions are those
    behind ``numba.get_num_threads``, without its locks, without giving up the interpreter's lock,
    and without declared types, which take five times as long (1.0 us, then 0.2 us for two calls).
    """
    numba_parallel: Any = sys.modules.get("numba.np.ufunc.parallel")
    if not getattr(numba_parallel, "_is_initialized", False):
        return None
    with_gil: Any = type(ctypes.pythonapi.Py_IsInitialized)
    return tuple(
        with_gil(ctypes.cast(function, ctypes.c_void_p).value)
        for function in (numba_parallel._get_num_threads, numba_parallel._set_num_threads)
    )


def layer() -> str:
    """Return the name of the threading layer of users' parallel functions."""
    numba_parallel: Any = importlib.import_module("numba.np.ufunc.parallel")
    with contextlib.suppress(ValueError):  # no layer can be loaded
        numba_parallel._launch_threads()
        return str(numba_parallel.threading_layer())
    return "cannot be loaded"
