"""Ring all-reduce: the additions of schedules/ring.py, in their order, within one memory.

Over links, a rank of R sends 2 (R - 1)/R of its S bytes, the least possible; step by step over
buffers of one memory, that would read and write 5 (R - 1) S bytes. Here the partial sum of a chunk,
which the ring passes from rank to rank, stays in registers of one thread and is stored to all ranks
when it is complete: 2 R S bytes, as in the direct algorithm, and no thread waits for another. The
bits are those of the ring; those of half types are better, since a sum in float32 is rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import checks
from dvkernels.kernels.cpu.engine import fast_path, job, recipe
from dvkernels.kernels.cpu.engine.job_layout import Row
from dvkernels.reduce_op import Reduction

__all__ = ["ring_all_reduce"]

# Segments of all replicas together, each a ring of its own: a thread finds the chunks of the next
# rows in its L2 cache. A segment's size depends only on the number of replicas, never on threads:
# the bounds of the chunks determine the order of the additions.
_SEGMENT_NBYTES = 256 * 1024


def ring_all_reduce(buffers: Any, op: Any = "sum", *, out: Any = None) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); see :func:`dvkernels.kernels`."""
    return all_reduce_as("ring_all_reduce", buffers, op, out)


def all_reduce_as(verb: str, buffers: Any, op: Any, out: Any) -> list[Any]:
    """Reduce around the ring; error messages name the function ``verb``."""
    buffers = checks.as_sequence(verb, buffers)
    if out is not None:
        out = checks.as_sequence(verb, out, "out")
    else:
        reduced = fast_path.all_reduce(buffers, op, _segment_nbytes(len(buffers) or 1))
        if reduced is not None:
            return reduced
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
    recipe.register(op, arrays[0].dtype)
    _run(op, len(arrays), arrays)


def combine(op: Reduction, reads: Sequence[HostArray], writes: Sequence[HostArray]) -> None:
    """Reduce ``reads`` into all of ``writes``; both have been checked."""
    _run(op, len(reads), [*reads, *writes])


def _segment_nbytes(num_ranks: int) -> int:
    return max(4096, _SEGMENT_NBYTES // num_ranks // 128 * 128)


def _run(op: Reduction, count: int, arrays: Sequence[HostArray]) -> None:
    program = _program(count, len(arrays) > count, job.divisor(op, count))
    job.run(op, arrays[0].dtype, [arrays], program, piece_nbytes=_segment_nbytes(count))


@functools.lru_cache(maxsize=64)
def _program(num_ranks: int, separate: bool, divisor: int) -> job.Program:
    """Return a row for each chunk: its chain of additions in the schedule, stored to all ranks.

    Chunk k is added up from rank k on, around the ring: its sources are num_ranks entries of a
    table that goes around twice. In place they are the targets as well.
    """
    around = [*range(num_ranks), *range(num_ranks - 1)]
    rows = tuple(
        Row(k, k, num_ranks, len(around) if separate else k, num_ranks, divisor)
        for k in range(num_ranks)
    )
    outs = [*range(num_ranks, 2 * num_ranks)] if separate else []
    first_write = num_ranks if separate else 0
    return job.Program(rows, (*around, *outs), num_ranks, first_write, num_ranks)
