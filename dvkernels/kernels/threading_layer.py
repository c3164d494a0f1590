"""Numba's threading layer under users' parallel functions (``numba.njit(parallel=True)``).

Where Numba finds neither TBB nor OpenMP it falls back to its workqueue, which ends the process when
two threads enter it, as replicas do. So a mutex lets them enter one at a time. A parallel function
inside another one is left to Numba, which refuses it with a message of its own.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

__all__ = ["guard", "layer"]


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

    launch_guarded.is_guarded = True  # type: ignore[attr-defined]
    vars(numba_parallel)["_launch_threads"] = launch_guarded


def layer() -> str:
    """Return the name of the threading layer of users' parallel functions."""
    numba_parallel: Any = importlib.import_module("numba.np.ufunc.parallel")
    with contextlib.suppress(ValueError):  # no layer can be loaded
        numba_parallel._launch_threads()
        return str(numba_parallel.threading_layer())
    return "cannot be loaded"
