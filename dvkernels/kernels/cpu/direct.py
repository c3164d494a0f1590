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
    elif out is not checks.NEW:
        out = checks.as_sequence(verb, out, "out")
        if len(out) == len(buffers) and fast_path.reduce_into(buffers, out, op):
            return list(out)
    reads = checks.arrays(verb, buffers)
    op = checks.reduction(verb, op, reads[0].dtype)
    if out is None:
        checks.check_in_place(verb, reads)
        recipe.register(op, reads[0].dtype)
        program = job.combine_in_place(len(reads), job.divisor(op, len(reads)))
        job.run(op, reads[0].dtype, [reads], program)
        return list(buffers)
    writes = checks.outputs_like(verb, reads, out)
    _combine(op, reads, writes)
    return writes if out is checks.NEW else list(out)


def reduce(buffers: Any, op: Any = "sum", *, out: Any = None) -> Any:
    """Return the reduction as one new array (or in ``out``); see :func:`dvkernels.kernels`."""
    return _reduce_as("reduce", buffers, op, out)


def aggregate_sum(buffers: Any, *, out: Any = None) -> Any:
    """Return the sum of the buffers."""
    return _reduce_as("aggregate_sum", buffers, ReduceOp.SUM, out)


def aggregate_mean(buffers: Any, *, out: Any = None) -> Any:
    """Return the mean of the buffers."""
    return _reduce_as("aggregate_mean", buffers, ReduceOp.MEAN, out)


def _reduce_as(verb: str, buffers: Any, op: Any, out: Any) -> Any:
    if out is not None and fast_path.reduce_into(buffers, [out], op):
        return out
    buffers = checks.as_sequence(verb, buffers)
    reads = checks.arrays(verb, buffers)
    op = checks.reduction(verb, op, reads[0].dtype)
    if out is None:
        result = np.empty_like(reads[0])
        _combine(op, reads, [result])
        return interop.like(result, buffers[0])
    writes = checks.arrays(verb, [out], "out")
    checks.check_out(verb, reads, writes, 1)
    _combine(op, reads, writes)
    return out


def _combine(op: Reduction, reads: Sequence[Any], writes: Sequence[Any]) -> None:
    """Reduce ``reads`` into all of ``writes``; both have been checked."""
    if fast_path.reduce_into(reads, writes, op):
        return
    recipe.register(op, reads[0].dtype)
    program = job.combine(len(reads), len(writes), job.divisor(op, len(reads)))
    job.run(op, reads[0].dtype, [[*reads, *writes]], program)
