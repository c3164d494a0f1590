"""Numba's CUDA simulator, which runs kernels as Python: whether it is on, and a launch in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from numba import config as numba_config
from numba import cuda as numba_cuda

__all__ = ["BLOCKS", "IS_ON", "THREADS", "launch"]

IS_ON = bool(vars(numba_config)["ENABLE_CUDASIM"])
# The fewest threads and blocks that are not one: each simulated thread is a Python thread.
THREADS, BLOCKS = 2, 2

_untyped_cuda: Any = numba_cuda
# The simulator runs one kernel at a time in the whole process.
_simulating = threading.RLock()


def launch(kernel: Callable[..., None], blocks: int, arguments: Sequence[int]) -> None:
    """Run a kernel, and wait for its end."""
    with _simulating:
        _untyped_cuda.jit(kernel)[blocks, THREADS](tuple(arguments))
