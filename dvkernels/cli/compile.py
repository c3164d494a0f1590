"""``python -m dvkernels compile``: compilation ahead of time, for images and read-only machines."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings

from dvkernels.cli import argument_types

__all__: list[str] = []

HELP = "compile all kernels for this processor now, into the folder that NUMBA_CACHE_DIR names"
EXAMPLES = (
    (
        "in an image whose file system is read-only later",
        "NUMBA_CACHE_DIR=/opt/cache python -m dvkernels compile",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the one option: the cache folder is that of every run, printed by ``info``."""
    argument_types.add_json(parser, "the seconds, the folder and the problems")


def run(arguments: argparse.Namespace) -> int:
    """Compile all kernels into the cache and print its folder; return 1 if there is no cache."""
    import numpy as np

    from dvkernels.cli import digits, mlp
    from dvkernels.devices.device import Device
    from dvkernels.kernels import compile_cache
    from dvkernels.kernels.cpu import compile_ahead

    started = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        compile_ahead.compile_all()
        for dtype in ("float32", "float64"):  # the network of ``train``
            weights = mlp.initial_weights(1, dtype, seed=0)
            weights.flags.writeable = False  # like those of a step: a read-only type
            images, labels = np.zeros((1, digits.NUM_PIXELS), dtype), np.zeros(1, np.int64)
            workspace = mlp.Workspace(1, 1, dtype, Device("cpu", 0))
            mlp.gradient_and_loss(weights, images, labels, workspace)
    seconds, folder = time.monotonic() - started, compile_cache.folder()
    problems = [str(problem.message) for problem in caught]
    if arguments.json:
        where = None if folder is None else str(folder)
        print(json.dumps({"seconds": seconds, "folder": where, "problems": problems}))
    else:
        print(f"compiled in {seconds:.0f} s: {compile_cache.describe()}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems or folder is None else 0
