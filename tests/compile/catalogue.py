"""Catalogue of all CUDA kernels, by name, for the tests of their machine code."""

from __future__ import annotations

import importlib.util

import numba
import numpy as np

from dvkernels.custom_reduction import CustomReduction
from dvkernels.kernels.cuda.engine import catalogue, operations
from dvkernels.kernels.cuda.engine.kernel import Kernel

_ROWS = {"float16", "float32"}
# Custom reductions over all kinds of elements: wide, packed, complex, boolean.
CUSTOM = {
    "farther": (numba.njit(lambda a, b: a if abs(a) >= abs(b) else b), "fdD"),
    "xor": (numba.njit(lambda a, b: a ^ b), "bHl?"),
}


def kernels() -> dict[str, Kernel]:
    """Return every kernel by name, but of the rows alone, which the waiting kernels hold, some."""
    found = {
        kernel.name: kernel
        for kernel in catalogue.shipped()
        if not kernel.name.startswith("row ") or kernel.name.split()[-1] in _ROWS
    }
    if (
        importlib.util.find_spec("numba_cuda") is None
    ):  # custom reductions need the compiler at once
        return found
    for name, (function, letters) in CUSTOM.items():
        for dtype in map(np.dtype, letters):
            resolved = operations.resolve(CustomReduction(function, 0, name), dtype)
            found[f"{name} {dtype}"] = catalogue.collective(*resolved)
            if dtype.char == "f":
                found[f"waiting {name} {dtype}"] = catalogue.waiting(*resolved)
    return found
