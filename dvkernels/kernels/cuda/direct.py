"""All-reduce and reduce in one launch: read all replicas, combine in registers, store.

Bytes moved for R replicas of S bytes: all-reduce 2 R S, reduce (R + 1) S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dvkernels.kernels import checks
from dvkernels.kernels.cuda.engine import fast_path, job
from dvkernels.kernels.cuda.engine.call import NEW, AllReduce, Buffers
from dvkernels.kernels.cuda.multi_gpu import all_reduce
from dvkernels.reduce_op import ReduceOp, Reduction

__all__ = ["aggregate_mean", "aggregate_sum", "direct_all_reduce", "reduce"]


def direct_all_reduce(
    buffers: Any, op: Any = "sum", *, out: Any = None, stream: Any = None
) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); see :func:`dvkernels.kernels`."""
    return all_reduce_as("direct_all_reduce", buffers, op, out, stream)


def all_reduce_as(
    verb: str,
    buffers: Any,
    op: Any,
    out: Any,
    stream: Any,
    between_gpus: str = "direct",
    is_checked: bool = False,
) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); errors call the function ``verb``.

    Buffers on several GPUs are reduced by the algorithm ``between_gpus``. ``is_checked``: shapes,
    dtypes and op have been checked by the caller.
    """
    buffers, described = checks.as_sequence(verb, buffers), None
    if out is None:
        described = fast_path.describe(buffers, (), op)
    elif out is not NEW:
        out = checks.as_sequence(verb, out, "out")
        described = fast_path.describe(buffers, out, op) if len(out) == len(buffers) else None
    if fast_path.repeat(described, verb, stream):
        return list(buffers if out is None else out)
    call = AllReduce(verb, buffers, op, out, stream, is_checked)
    if call.is_multi_gpu:
        return all_reduce.all_reduce(call, between_gpus)
    writes = call.targets()
    arrays = writes if call.is_in_place else [*call.reads, *writes]
    with call.ordered() as work_stream:
        count = len(call.reads)
        job.combine(work_stream, call.op, call.dtype, [arrays], count, in_place=call.is_in_place)
    fast_path.learn(described, call.op, arrays)
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


def reduce_unchecked(arrays: Sequence[Any], op: Reduction) -> Any:
    """Return the reduction as one new array; the caller has checked the arrays."""
    call = Buffers("reduce", arrays, None, None)
    writes = call.new_results([call.reads[0].shape])
    _reduce(call, op, writes)
    return call.results[0]


def _reduce_as(verb: str, buffers: Any, op: Any, out: Any, stream: Any) -> Any:
    buffers, described = checks.as_sequence(verb, buffers), None
    if out is not None:
        described = fast_path.describe(buffers, (out,), op)
        if fast_path.repeat(described, verb, stream):
            return out
    call = Buffers(verb, buffers, None if out is None else [out], stream)
    reads = checks.arrays(verb, call.reads)
    op = job.check_op(verb, op, reads[0].dtype)
    if call.out is None:
        writes = call.new_results([reads[0].shape])
    else:
        writes = call.out
        checks.check_out(verb, reads, writes, 1)
    _reduce(call, op, writes)
    fast_path.learn(described, op, [*reads, *writes])
    return call.results[0]


def _reduce(call: Buffers, op: Reduction, writes: Sequence[Any]) -> None:
    reads = call.reads
    with call.ordered() as work_stream:
        job.combine(work_stream, op, reads[0].dtype, [[*reads, *writes]], len(reads))
