"""Users' own parallel functions (``numba.njit(parallel=True)``) in several replicas at once.

Where Numba finds neither TBB nor OpenMP it falls back to its workqueue, which ends the process when
two threads enter it. So there each waits for its turn. A parallel function inside another one is
left to Numba, which refuses it with a message of its own.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

__all__ = ["guard", "layer"]


def guard() -> None:
    """Let parallel functions that are compiled from now on enter the workqueue one at a time."""
    numba_parallel = importlib.import_module("numba.np.ufunc.parallel")
    launch = numba_parallel._launch_threads
    if getattr(launch, "is_guarded", False):
        return

    def launch_guarded() -> None:
        is_first = not numba_parallel._is_initialized
        launch()
        if is_first and numba_parallel._threading_layer == "workqueue":
            # Imported here: it is compiled, and most programs never come this way.
            importlib.import_module("dvkernels.kernels.cpu.engine.workqueue_mutex").take_turns()

    launch_guarded.is_guarded = True  # type: ignore[attr-defined]
    vars(numba_parallel)["_launch_threads"] = launch_guarded


def layer() -> str:
    """Return the name of the layer that parallel functions of users have here."""
    numba_parallel: Any = importlib.import_module("numba.np.ufunc.parallel")
    with contextlib.suppress(ValueError):  # that none can be loaded
        numba_parallel._launch_threads()
        return str(numba_parallel.threading_layer())
    return "cannot be loaded"
