"""Message ring: bytes from one process to another, through a ring of shared memory.

    line 0   bytes written since the beginning, by the writer
    line 1   bytes read since the beginning, by the reader
    then     the bytes, byte n at n modulo the capacity

Each count is published after the bytes that it covers, by a store that no other passes, so neither
side takes a lock, and a process that is killed leaves a ring that the other may go on reading.
"""

from __future__ import annotations

from typing import NamedTuple

from dvkernels.kernels import jit
from dvkernels.kernels.cpu.engine import intrinsics, records

__all__: list[str] = []

CAPACITY = 1 << 17  # bytes: half of an L2 cache
_DATA = 2 * records.LINE_NBYTES
RING_NBYTES = _DATA + CAPACITY


class _ByteCount(NamedTuple):
    total: int


_count_at = records.view(records.layout(_ByteCount))


@jit.njit(called_with="(int64,int64,int64)", nogil=True)
def put(ring, source, nbytes):  # type: ignore[no-untyped-def]
    """Write as many of the bytes at an address as have room; return their number."""
    written = intrinsics.load_shared(_count_at(ring), "total")
    read = intrinsics.load_shared(_count_at(ring + records.LINE_NBYTES), "total")
    count = min(nbytes, CAPACITY - (written - read))
    start = written % CAPACITY
    first = min(count, CAPACITY - start)
    intrinsics.copy(ring + _DATA + start, source, first)
    intrinsics.copy(ring + _DATA, source + first, count - first)
    intrinsics.store_shared(_count_at(ring), "total", written + count)
    return count


@jit.njit(called_with="(int64,int64,int64)", nogil=True)
def take(ring, target, nbytes):  # type: ignore[no-untyped-def]
    """Read as many bytes to an address as have been written; return their number."""
    written = intrinsics.load_shared(_count_at(ring), "total")
    read = intrinsics.load_shared(_count_at(ring + records.LINE_NBYTES), "total")
    count = min(nbytes, written - read)
    start = read % CAPACITY
    first = min(count, CAPACITY - start)
    intrinsics.copy(target, ring + _DATA + start, first)
    intrinsics.copy(target + first, ring + _DATA, count - first)
    intrinsics.store_shared(_count_at(ring + records.LINE_NBYTES), "total", read + count)
    return count
