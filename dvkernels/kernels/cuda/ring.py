"""Ring all-reduce (schedules/ring.py) within one GPU, in one launch.

Run step by step over whole buffers, a ring moves 5 (R - 1) S bytes of memory. This kernel keeps the
sum of each chunk in registers and adds the replicas in the order in which the ring visits them:
2 R S bytes, and one rounding.
"""

from __future__ import annotations

from typing import Any

from dvkernels.kernels.cuda.engine import job
from dvkernels.kernels.cuda.engine.call import AllReduce
from dvkernels.kernels.cuda.multi_gpu import all_reduce
from dvkernels.schedules import partition, ring

__all__ = ["ring_all_reduce"]


def ring_all_reduce(
    buffers: Any, op: Any = "sum", *, out: Any = None, stream: Any = None
) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); see :func:`dvkernels.kernels`."""
    return all_reduce_as("ring_all_reduce", buffers, op, out, stream)


def all_reduce_as(
    verb: str, buffers: Any, op: Any, out: Any, stream: Any, is_checked: bool = False
) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); errors call the function ``verb``.

    ``is_checked``: shapes, dtypes and op have been checked by the caller.
    """
    call = AllReduce(verb, buffers, op, out, stream, is_checked)
    if call.is_multi_gpu:
        return all_reduce.all_reduce(call, "ring")
    reads, writes = call.reads, call.targets()
    count = len(reads)
    groups = []
    # Chunks are cut along the first axis: along several axes a chunk may not be a strided array.
    length = len(reads[0]) if reads[0].ndim else 1
    for (start, stop), chain in zip(
        partition.parts(length, count), ring.chains(count), strict=True
    ):
        chunk = slice(start, stop) if reads[0].ndim else ... if start < stop else None
        if chunk is not None:
            groups.append([*(reads[k][chunk] for k in chain), *(write[chunk] for write in writes)])
    with call.ordered() as work_stream:
        job.combine(work_stream, call.op, call.dtype, groups, count)
    return list(call.results)
