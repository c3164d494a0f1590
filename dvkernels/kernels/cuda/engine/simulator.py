"""Numba's CUDA simulator, which runs kernels as Python on the host: whether it is on, and a launch.

It is for tests, and goes when Numba's does: docs/explanation/cuda.md says what takes its place.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dvkernels.devices import cuda
from dvkernels.kernels import checks, numba_import
from dvkernels.kernels.cuda.engine import table_layout
from dvkernels.kernels.cuda.engine.kernel import Kernel

__all__ = ["IS_ON", "THREADS", "launch", "share_swaps"]

IS_ON = cuda.is_simulated()
THREADS = 2  # per block: the fewest that are not one, since each is a thread of Python
# The simulator runs one kernel at a time in the whole process.
_simulating = threading.RLock()


def share_swaps(target: Any) -> None:
    """Let all threads of a simulated block find the block's module under the name of the target.

    The simulator swaps the module in the globals of each function that a thread calls, and reverts
    its swap when the first of the threads returns. This one counts them.
    """
    swaps: dict[int, int] = {}  # by the globals of a function: threads that run it
    lock = threading.RLock()

    def swap(variables: dict[str, Any], change: int, old: Any, new: Any) -> None:
        with lock:
            before = swaps.get(id(variables), 0)
            swaps[id(variables)] = before + change
            if 0 in (before, before + change):
                variables.update({name: new for name, value in variables.items() if value is old})

    @contextlib.contextmanager
    def swapped(function: Callable[..., Any], simulated: Any) -> Iterator[None]:
        swap(function.__globals__, 1, target, simulated)
        try:
            yield
        finally:
            swap(function.__globals__, -1, simulated, target)

    numba_import.module("numba.cuda.simulator.kernel").swapped_cuda_module = swapped


def launch(kernel: Kernel, blocks: int, words: Sequence[int]) -> None:
    """Run a kernel over a table of words, and wait for its end."""
    table = np.array(words, np.int64)
    arguments = (checks.address(table), *[0] * (table_layout.NUM_WORDS - 1))
    function, target = kernel.build(), numba_import.module("numba.cuda")
    with _simulating:
        simulated: Any = target.jit(function)
        simulated[blocks, kernel.launch_bounds[0]](arguments)
