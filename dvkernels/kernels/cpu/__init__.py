"""The CPU twin: collectives compiled by Numba, run by the threads of our own pool.

Imports: custom_reduction, deadlines, devices, errors, kernels, reduce_op, schedules, threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.kernels import checks
from dvkernels.kernels.cpu import direct, optimizers, ring
from dvkernels.kernels.cpu.broadcast import broadcast
from dvkernels.kernels.cpu.direct import aggregate_mean, aggregate_sum, direct_all_reduce, reduce
from dvkernels.kernels.cpu.engine import fast_path
from dvkernels.kernels.cpu.gather import all_gather, all_to_all, reduce_scatter
from dvkernels.kernels.cpu.many import all_reduce_many
from dvkernels.kernels.cpu.ring import ring_all_reduce
from dvkernels.schedules import cost_model

__all__ = [
    "aggregate_mean",
    "aggregate_sum",
    "all_gather",
    "all_reduce",
    "all_reduce_many",
    "all_reduce_new",
    "all_to_all",
    "broadcast",
    "direct_all_reduce",
    "optimizers",
    "reduce",
    "reduce_scatter",
    "ring_all_reduce",
]


def _cheapest(verb: str, buffers: Any, op: Any, out: Any) -> list[Any]:
    """Reduce by the algorithm that the cost model finds cheapest."""
    buffers = checks.as_sequence(verb, buffers)
    nbytes = getattr(buffers[0], "nbytes", 0) if buffers else 0
    chosen = cost_model.cheapest(cost_model.CPU, len(buffers) or 1, nbytes)
    return _ALGORITHMS[chosen](verb, buffers, op, out)


_ALGORITHMS = {
    "auto": _cheapest,
    "direct": direct.all_reduce_as,
    "ring": ring.all_reduce_as,
}


def all_reduce_new(buffers: Any, op: Any, algorithm: str) -> list[Any]:
    """Return the reduction as one new array per buffer; the buffers are not changed."""
    if algorithm == "auto":
        reads = [*buffers]
        writes = [np.empty(read.shape, read.dtype) for read in reads]
        if fast_path.reduce_into(reads, writes, op):
            return writes
    return _ALGORITHMS[algorithm]("all_reduce", buffers, op, checks.NEW)


def all_reduce(
    buffers: Any, op: Any = "sum", *, algorithm: Any = "auto", out: Any = None
) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); see :func:`dvkernels.kernels`."""
    # The fast path is direct, which in one memory domain is the cheapest algorithm at every size.
    if out is None and algorithm == "auto":
        reduced = fast_path.all_reduce(buffers, op)
        if reduced is not None:
            return reduced
    chosen = checks.algorithm("all_reduce", algorithm, _ALGORITHMS)
    return chosen("all_reduce", buffers, op, out)
