"""Broadcast: one buffer is read once and stored to all others, whatever its dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.kernels import checks
from dvkernels.kernels.cpu import elementwise, jobs
from dvkernels.reduce_op import ReduceOp

__all__ = ["broadcast"]

# The sum of one source is a copy, so the kernel of int8 sums moves the bytes of every dtype.
_BYTE = np.dtype(np.int8)
_TABLES = elementwise.HEADER + elementwise.ROW


def broadcast(buffers: Any, root: int = 0) -> list[Any]:
    """Leave ``buffers[root]`` in every buffer; see :func:`dvkernels.kernels`."""
    views = checks.arrays("broadcast", buffers)
    root = checks.check_root("broadcast", root, len(views))
    checks.check_dtype_moves("broadcast", views[0].dtype)
    checks.in_place("broadcast", views)
    source = views.pop(root)

    def program(addresses: list[int]) -> tuple[list[int], int]:
        return [-1, _TABLES, 1, _TABLES + 1, len(views), 1, *addresses], 1

    if views:
        jobs.run(ReduceOp.SUM, [source], views, program, dtype=_BYTE)
    return list(buffers)
