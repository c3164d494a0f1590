"""All-reduce and reduce in one launch: read every replica, combine in registers, store.

Bytes moved for R replicas of S bytes: all-reduce 2 R S, reduce (R + 1) S.
"""

from __future__ import annotations

from typing import Any

from dvkernels.kernels import checks
from dvkernels.kernels.cuda import between, jobs
from dvkernels.kernels.cuda.calls import Buffers
from dvkernels.reduce_op import ReduceOp

__all__ = ["aggregate_mean", "aggregate_sum", "direct_all_reduce", "reduce"]


def direct_all_reduce(
    buffers: Any, op: Any = "sum", *, out: Any = None, stream: Any = None
) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); see :func:`dvkernels.kernels`."""
    return all_reduce_as("direct_all_reduce", buffers, op, out, stream)


def all_reduce_as(verb: str, buffers: Any, op: Any, out: Any, stream: Any) -> list[Any]:
    """Reduce under the name ``verb``, which error messages mention."""
    call = Buffers(verb, buffers, None if out is checks.NEW else out, stream)
    reads = checks.arrays(verb, call.reads)
    dtype, count = reads[0].dtype, len(reads)
    op = jobs.checked(verb, op, dtype)
    if call.is_spread:
        return between.all_reduce(call, op, out, "direct")
    if out is None:
        checks.in_place(verb, reads)
        groups = [reads]
    elif out is checks.NEW:
        groups = [[*reads, *call.made([read.shape for read in reads])]]
    else:
        groups = [[*reads, *checks.results(verb, reads, call.out)]]
    with call.ordered() as order:
        jobs.combine(order, op, dtype, groups, count, in_place=out is None)
    return list(call.results)


def reduce(buffers: Any, op: Any = "sum", *, out: Any = None, stream: Any = None) -> Any:
    """Return the reduction as one new array (or in ``out``); see :func:`dvkernels.kernels`."""
    return _reduce_as("reduce", buffers, op, out, stream)


def aggregate_sum(buffers: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Return the sum of the buffers."""
    return _reduce_as("aggregate_sum", buffers, ReduceOp.SUM, out, stream)


def aggregate_mean(buffers: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Return the mean of the buffers."""
    return _reduce_as("aggregate_mean", buffers, ReduceOp.MEAN, out, stream)


def _reduce_as(verb: str, buffers: Any, op: Any, out: Any, stream: Any) -> Any:
    call = Buffers(verb, buffers, None if out is None else [out], stream)
    reads = checks.arrays(verb, call.reads)
    op = jobs.checked(verb, op, reads[0].dtype)
    if call.out is None:
        writes = call.made([reads[0].shape])
    else:
        writes = call.out
        checks.separate(verb, reads, writes, 1)
    with call.ordered() as order:
        jobs.combine(order, op, reads[0].dtype, [[*reads, *writes]], len(reads))
    return call.results[0]
