"""Direct all-reduce and reduce, in one pass: load from every replica, combine in registers, store.

Bytes moved for R replicas of S bytes: all-reduce in place 2 R S, reduce (R + 1) S (and the read
for ownership of the new array). No element is read twice, so neither a tile nor an accumulator in
memory is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dvkernels.devices import interop
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import checks
from dvkernels.kernels.cpu.engine import fast_path, job, recipe
from dvkernels.reduce_op import ReduceOp, Reduction

__all__ = ["aggregate_mean", "aggregate_sum", "direct_all_reduce", "reduce"]


def direct_all_reduce(buffers: Any, op: Any = "sum", *, out: Any = None) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); see :func:`dvkernels.kernels`."""
    return all_reduce_as("direct_all_reduce", buffers, op, out)


def all_reduce_as(verb: str, buffers: Any, op: Any, out: Any) -> list[Any]:
    """Reduce directly; error messages name the function ``verb``."""
    buffers = checks.as_sequence(verb, buffers)
    if out is None:
        reduced = fast_path.all_reduce(buffers, op)
        if reduced is not None:
            return reduced
    else:
        out = checks.as_sequence(verb, out, "out")
        if len(out) == len(buffers) and fast_path.reduce_into(buffers, out, op):
            return list(out)
    reads = checks.arrays(verb, buffers)
    op = checks.reduction(verb, op, reads[0].dtype)
    if out is None:
        checks.check_in_place(verb, reads)
        combine_in_place(op, reads)
        return list(buffers)
    combine(op, reads, checks.outputs_like(verb, reads, out))
    return list(out)


def reduce(buffers: Any, op: Any = "sum", *, out: Any = None) -> Any:
    """Return the reduction as one new array (or in ``out``); see :func:`dvkernels.kernels`."""
    return _reduce_as("reduce", buffers, op, out)


def aggregate_sum(buffers: Any, *, out: Any = None) -> Any:
    """Return the sum of the buffers."""
    return _reduce_as("aggregate_sum", buffers, ReduceOp.SUM, out)


def aggregate_mean(buffers: Any, *, out: Any = None) -> Any:
    """Return the mean of the buffers."""
    return _reduce_as("aggregate_mean", buffers, ReduceOp.MEAN, out)


def reduce_unchecked(arrays: Sequence[HostArray], op: Reduction) -> HostArray:
    """Return the reduction as one new array; the caller has checked the arrays."""
    result = np.empty_like(arrays[0])
    if not fast_path.reduce_into(arrays, [result], op):
        combine(op, arrays, [result])
    return result


def _reduce_as(verb: str, buffers: Any, op: Any, out: Any) -> Any:
    if out is not None and fast_path.reduce_into(buffers, [out], op):
        return out
    buffers = checks.as_sequence(verb, buffers)
    reads = checks.arrays(verb, buffers)
    op = checks.reduction(verb, op, reads[0].dtype)
    if out is None:
        return interop.like(reduce_unchecked(reads, op), buffers[0])
    writes = checks.arrays(verb, [out], "out")
    checks.check_out(verb, reads, writes, 1)
    combine(op, reads, writes)
    return out


def combine_in_place(op: Reduction, arrays: Sequence[HostArray]) -> None:
    """Reduce checked arrays, and leave the result in all of them."""
    recipe.register(op, arrays[0].dtype)
    program = job.combine_in_place(len(arrays), job.divisor(op, len(arrays)))
    job.run(op, arrays[0].dtype, [arrays], program)


def combine(op: Reduction, reads: Sequence[HostArray], writes: Sequence[HostArray]) -> None:
    """Reduce ``reads`` into all of ``writes``, both checked, where there is no fast path."""
    recipe.register(op, reads[0].dtype)
    program = job.combine(len(reads), len(writes), job.divisor(op, len(reads)))
    job.run(op, reads[0].dtype, [[*reads, *writes]], program)
