"""Reduce-scatter, all-gather and all-to-all in one launch each.

Bytes moved for R replicas of S bytes: reduce_scatter R S + S, all_gather R S + R R S, all_to_all
2 R S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dvkernels.kernels import checks, slices
from dvkernels.kernels.cuda.engine import job
from dvkernels.kernels.cuda.engine.call import Buffers
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition

__all__ = ["all_gather", "all_to_all", "reduce_scatter"]


def reduce_scatter(
    buffers: Any, op: Any = "sum", *, out: Any = None, stream: Any = None
) -> list[Any]:
    """Return part r of the reduction for replica r; see :func:`dvkernels.kernels`."""
    call = Buffers("reduce_scatter", buffers, out, stream)
    reads = checks.arrays("reduce_scatter", call.reads)
    op = job.check_op("reduce_scatter", op, reads[0].dtype)
    checks.check_axis("reduce_scatter", 0, reads[0])
    return _reduce_scatter(call, op)


def reduce_scatter_unchecked(arrays: Sequence[Any], op: Reduction) -> list[Any]:
    """Return part r of the reduction for replica r; the caller has checked the arrays."""
    return _reduce_scatter(Buffers("reduce_scatter", arrays, None, None), op)


def _reduce_scatter(call: Buffers, op: Reduction) -> list[Any]:
    reads = call.reads
    parts = partition.parts(len(reads[0]), len(reads))
    rest = reads[0].shape[1:]
    writes = call.outputs([(stop - start, *rest) for start, stop in parts])
    groups = slices.scattered(reads, parts, writes)
    with call.ordered() as work_stream:
        job.combine(work_stream, op, reads[0].dtype, groups, len(reads))
    return list(call.results)


def all_gather(buffers: Any, axis: Any = 0, *, out: Any = None, stream: Any = None) -> list[Any]:
    """Return the concatenation for each replica; see :func:`dvkernels.kernels`."""
    call = Buffers("all_gather", buffers, out, stream)
    reads, axis = checks.arrays_along("all_gather", call.reads, axis)
    checks.check_dtype_moves("all_gather", reads[0].dtype)
    return _all_gather(call, axis)


def all_gather_unchecked(arrays: Sequence[Any], axis: int) -> list[Any]:
    """Return the concatenation for each replica; the caller has checked the arrays."""
    return _all_gather(Buffers("all_gather", arrays, None, None), axis)


def _all_gather(call: Buffers, axis: int) -> list[Any]:
    reads = call.reads
    writes = call.outputs([slices.joined_shape(reads, axis)] * len(reads))
    with call.ordered() as work_stream:
        job.move(work_stream, slices.gathered(reads, axis, writes))
    return list(call.results)


def all_to_all(buffers: Any, *, out: Any = None, stream: Any = None) -> list[Any]:
    """Return part i of every buffer, in replica order, for replica i."""
    call = Buffers("all_to_all", buffers, out, stream)
    reads = checks.arrays("all_to_all", call.reads)
    checks.check_dtype_moves("all_to_all", reads[0].dtype)
    checks.check_axis("all_to_all", 0, reads[0])
    parts = partition.parts(len(reads[0]), len(reads))
    rest = reads[0].shape[1:]
    writes = call.outputs([(len(reads) * (stop - start), *rest) for start, stop in parts])
    with call.ordered() as work_stream:
        job.move(work_stream, slices.exchanged(reads, parts, writes))
    return list(call.results)
