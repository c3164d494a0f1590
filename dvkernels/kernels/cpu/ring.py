"""The ring all-reduce of schedules/ring.py, replayed in shared memory.

Step by step over whole buffers a ring moves 5 (R - 1) S bytes of memory. Here one thread replays
the whole schedule over a segment of all replicas that stays in its cache, so that memory sees
2 R S, as in the direct algorithm, and no thread waits for another.
"""

from __future__ import annotations

import functools
from typing import Any

from dvkernels.kernels import checks
from dvkernels.kernels.cpu import elementwise, jobs
from dvkernels.schedules import ring

__all__ = ["ring_all_reduce"]

# A segment of all replicas together: a quarter of a 1 MiB L2 cache. It depends on the number of
# replicas alone, never on threads, because where chunks lie decides the order of the additions.
_SEGMENT_NBYTES = 256 * 1024


def ring_all_reduce(buffers: Any, op: Any = "sum", *, out: Any = None) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); see :func:`dvkernels.kernels`."""
    return all_reduce_as("ring_all_reduce", buffers, op, out)


def all_reduce_as(verb: str, buffers: Any, op: Any, out: Any) -> list[Any]:
    """Reduce under the name ``verb``, which error messages mention."""
    reads = checks.arrays(verb, buffers)
    op = checks.reduction(verb, op, reads[0].dtype)
    count = len(reads)
    if out is None:
        checks.in_place(verb, reads)
        writes = reads
    else:
        writes = checks.results(verb, reads, out)
    plan = _plan(count, out is not None)

    def program(addresses: list[int]) -> tuple[list[int], int]:
        rows: list[int] = []
        tables: list[int] = []
        start = elementwise.HEADER + elementwise.ROW * len(plan)
        for chunk, target, source, accumulate, divisor in plan:
            # One table of two entries serves as sources (target, source) and as the target.
            table = start + len(tables)
            tables += (addresses[target], addresses[source])
            rows += (chunk, table + 1 - accumulate, 1 + accumulate, table, 1, divisor)
        return rows + tables, len(plan)

    nbytes = max(4096, _SEGMENT_NBYTES // count // 128 * 128)
    jobs.run(op, reads, writes, program, num_chunks=count, piece_nbytes=nbytes)
    if out is checks.NEW:
        return writes
    return list(buffers if out is None else out)


@functools.lru_cache(maxsize=64)
def _plan(num_ranks: int, separate: bool) -> list[tuple[int, int, int, int, int]]:
    """Return (chunk, target, source, accumulate, divisor) of each step; arrays by operand index."""
    offset = num_ranks if separate else 0
    plan = [(-1, offset + rank, rank, 0, 1) for rank in range(num_ranks)] if separate else []
    for index, tick in enumerate(ring.all_reduce(num_ranks)):
        # The last accumulation of a chunk completes it: a mean divides there, once.
        divisor = num_ranks if index == num_ranks - 2 else 1
        for step in tick:
            target, source = offset + step.target, offset + step.source
            plan.append((step.chunk, target, source, int(step.accumulate), divisor))
    return plan
