"""Ring all-reduce: the schedule of schedules/ring.py, replayed within one memory.

Step by step over whole buffers a ring of R replicas of S bytes moves 5 (R - 1) S bytes. Here one
thread replays the whole schedule over a segment of all replicas that stays in its cache, so that
2 R S bytes go to and from memory, as in the direct algorithm, and no thread waits for another.

A half type would be rounded at each step of the schedule. So the sum of each of its chunks is kept
in registers: the same additions in the order of the schedule, in float32, and one rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import checks
from dvkernels.kernels.cpu.engine import job
from dvkernels.kernels.cpu.engine.job_layout import Row
from dvkernels.reduce_op import ReduceOp, Reduction, is_half
from dvkernels.schedules import ring

__all__ = ["ring_all_reduce"]

# Segments of all replicas together: a quarter of a 1 MiB L2 cache. A segment's size depends only
# on the number of replicas, never on threads: the bounds of the chunks determine the order of the
# additions.
_SEGMENT_NBYTES = 256 * 1024


def ring_all_reduce(buffers: Any, op: Any = "sum", *, out: Any = None) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); see :func:`dvkernels.kernels`."""
    return all_reduce_as("ring_all_reduce", buffers, op, out)


def all_reduce_as(verb: str, buffers: Any, op: Any, out: Any) -> list[Any]:
    """Reduce around the ring; error messages name the function ``verb``."""
    buffers = checks.as_sequence(verb, buffers)
    if out is not None:
        out = checks.as_sequence(verb, out, "out")
    reads = checks.arrays(verb, buffers)
    op = checks.reduction(verb, op, reads[0].dtype)
    if out is None:
        checks.check_in_place(verb, reads)
        combine_in_place(op, reads)
        return list(buffers)
    combine(op, reads, checks.outputs_like(verb, reads, out))
    return list(out)


def combine_in_place(op: Reduction, arrays: Sequence[HostArray]) -> None:
    """Reduce checked arrays, and leave the result in all of them."""
    _run(op, len(arrays), arrays)


def combine(op: Reduction, reads: Sequence[HostArray], writes: Sequence[HostArray]) -> None:
    """Reduce ``reads`` into all of ``writes``; both have been checked."""
    _run(op, len(reads), [*reads, *writes])


def _run(op: Reduction, count: int, arrays: Sequence[HostArray]) -> None:
    dtype = arrays[0].dtype
    program = _program(count, len(arrays) > count, op is ReduceOp.MEAN, is_half(dtype))
    nbytes = max(4096, _SEGMENT_NBYTES // count // 128 * 128)
    job.run(op, dtype, [arrays], program, piece_nbytes=nbytes)


@functools.lru_cache(maxsize=64)
def _program(num_ranks: int, separate: bool, is_mean: bool, in_registers: bool) -> job.Program:
    rows, table = (_chains if in_registers else _steps)(num_ranks, separate, is_mean)
    first_write = num_ranks if separate else 0
    return job.Program(tuple(rows), tuple(table), num_ranks, first_write, num_ranks)


_Rows = list[Row]


def _steps(num_ranks: int, separate: bool, is_mean: bool) -> tuple[_Rows, list[int]]:
    """Return a row for each step of the schedule; if ``separate``, copy first and work in out."""
    offset = num_ranks if separate else 0
    table = [*range(2 * num_ranks)] if separate else [*range(num_ranks)]
    rows = [Row(-1, rank, 1, offset + rank, 1, 1) for rank in range(num_ranks) if separate]
    for index, tick in enumerate(ring.all_reduce(num_ranks)):
        # The last accumulation of a chunk completes it: a mean divides there, once.
        divisor = num_ranks if is_mean and index == num_ranks - 2 else 1
        for step in tick:
            # Two entries serve as sources (target, source) and the first as the target.
            entry = len(table)
            table += (offset + step.target, offset + step.source)
            accumulates = int(step.accumulate)
            sources = entry + 1 - accumulates, 1 + accumulates
            rows.append(Row(step.chunk, *sources, entry, 1, divisor))
    return rows, table


def _chains(num_ranks: int, separate: bool, is_mean: bool) -> tuple[_Rows, list[int]]:
    """Return a row for each chunk: its chain of additions in the schedule, stored to all."""
    table = [*range(num_ranks, 2 * num_ranks)] if separate else [*range(num_ranks)]
    rows: _Rows = []
    for chunk, chain in enumerate(ring.chains(num_ranks)):
        divisor = num_ranks if is_mean else 1
        rows.append(Row(chunk, len(table), num_ranks, 0, num_ranks, divisor))
        table += chain
    return rows, table
