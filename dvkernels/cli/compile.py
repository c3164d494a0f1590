"""``python -m dvkernels compile``: compilation ahead of time, for images and read-only machines."""

from __future__ import annotations

import argparse
import sys
import time
import warnings

import numpy as np

from dvkernels.cli import digits, mlp
from dvkernels.devices.device import Device
from dvkernels.kernels import compile_cache
from dvkernels.kernels.cpu import compile_ahead

__all__: list[str] = []

HELP = "compile all kernels for this processor now, into the folder that NUMBA_CACHE_DIR names"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no options: the cache folder is that of every run, printed by ``info``."""


def run(arguments: argparse.Namespace) -> int:
    """Compile all kernels into the cache and print its folder; return 1 if there is no cache."""
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as problems:
        warnings.simplefilter("always", RuntimeWarning)
        compile_ahead.compile_all()
        for dtype in ("float32", "float64"):  # the network of ``train``
            weights = mlp.initial_weights(1, dtype, seed=0)
            weights.flags.writeable = False  # like those of a step: a read-only type
            images, labels = np.zeros((1, digits.NUM_PIXELS), dtype), np.zeros(1, np.int64)
            workspace = mlp.Workspace(1, 1, dtype, Device("cpu", 0))
            mlp.gradient_and_loss(weights, images, labels, workspace)
    print(f"compiled in {time.monotonic() - started:.0f} s: {compile_cache.describe()}")
    for problem in problems:
        print(f"error: {problem.message}", file=sys.stderr)
    return 1 if problems or compile_cache.folder() is None else 0
