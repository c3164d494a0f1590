"""The CPU twin: collectives compiled by Numba, run by the threads of our own pool.

Imports: custom_reduction, deadlines, devices, errors, kernels, reduce_op, schedules, threads.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import checks
from dvkernels.kernels.cpu import direct, optimizers, ring
from dvkernels.kernels.cpu.broadcast import broadcast
from dvkernels.kernels.cpu.broadcast import broadcast_many_unchecked as broadcast_many_unchecked
from dvkernels.kernels.cpu.direct import aggregate_mean, aggregate_sum, direct_all_reduce, reduce
from dvkernels.kernels.cpu.direct import reduce_unchecked as reduce_unchecked
from dvkernels.kernels.cpu.engine import fast_path
from dvkernels.kernels.cpu.gather import all_gather, all_to_all, reduce_scatter
from dvkernels.kernels.cpu.gather import all_gather_unchecked as all_gather_unchecked
from dvkernels.kernels.cpu.gather import reduce_scatter_unchecked as reduce_scatter_unchecked
from dvkernels.kernels.cpu.many import all_reduce_many
from dvkernels.kernels.cpu.ring import ring_all_reduce
from dvkernels.reduce_op import Reduction

# The *_unchecked functions are for communicators, whose callers have checked the arguments: no part
# of the interface.
__all__ = [
    "aggregate_mean",
    "aggregate_sum",
    "all_gather",
    "all_reduce",
    "all_reduce_many",
    "all_to_all",
    "broadcast",
    "direct_all_reduce",
    "optimizers",
    "reduce",
    "reduce_scatter",
    "ring_all_reduce",
]


# Both algorithms move 2 R S bytes; the direct one splits them into fewer parts.
_ALGORITHMS: dict[str, Any] = {"auto": direct, "direct": direct, "ring": ring}


def all_reduce_unchecked(
    arrays: Sequence[HostArray],
    op: Reduction,
    algorithm: str,
    out: Sequence[HostArray] | None = None,
) -> list[HostArray]:
    """Reduce into new arrays, or into ``out``, which may be the arrays themselves.

    The caller has checked the arguments, but not that no array of ``out`` shares an element with
    another array: their addresses are read here.
    """
    # The fast path is direct, as in all_reduce.
    if out is not None and all(map(operator.is_, out, arrays)):
        if algorithm == "ring" or fast_path.all_reduce(arrays, op) is None:
            checks.check_in_place("all_reduce", arrays)
            _ALGORITHMS[algorithm].combine_in_place(op, arrays)
        return list(out)
    writes = out or [np.empty(array.shape, array.dtype) for array in arrays]
    if algorithm == "ring" or not fast_path.reduce_into(arrays, writes, op):
        if out is not None:
            checks.check_overlaps("all_reduce", writes, arrays, "out {}".format)
        _ALGORITHMS[algorithm].combine(op, arrays, writes)
    return list(writes)


def all_reduce(
    buffers: Any, op: Any = "sum", *, algorithm: Any = "auto", out: Any = None
) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); see :func:`dvkernels.kernels`."""
    # The fast path without segments is direct.
    if out is None and algorithm == "auto":
        reduced = fast_path.all_reduce(buffers, op)
        if reduced is not None:
            return reduced
    module = checks.algorithm("all_reduce", algorithm, _ALGORITHMS)
    results: list[Any] = module.all_reduce_as("all_reduce", buffers, op, out)
    return results
