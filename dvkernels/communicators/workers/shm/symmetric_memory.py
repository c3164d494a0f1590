"""Symmetric memory: arrays at the same offset of every worker's segment, reduced in place.

Every worker owns a segment and maps those of all workers of its host. All workers allocate an array
together, at the same offset of each segment, so the offset of a worker's own array gives the
addresses of all others (as in OpenSHMEM). A block is reused when no worker has an array in it any
more; the workers report unused blocks to each other whenever they allocate.
"""

from __future__ import annotations

import bisect
import itertools
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, final

import numpy as np

from dvkernels.communicators.workers.shm import available
from dvkernels.devices.array_spec import HostArray, Spec
from dvkernels.errors import DeviceError
from dvkernels.kernels import checks
from dvkernels.kernels.cpu import direct, many
from dvkernels.profiler.memory_report import Holding
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition

__all__: list[str] = []

_LINE = 64
_MIN_SEGMENT_NBYTES = 16 * 1024 * 1024  # MPI windows should be few and large
_MAX_SEGMENT_NBYTES = 1 << 44  # an offset is segment number * this + byte offset
_POSITIVE = (1 << 62) - 1
_MAX_LOCATED = 256

Agree: TypeAlias = Callable[..., list[list[int]]]
# A column is [*sources, *targets]: flat arrays of one length. All columns have as many of each.
Columns: TypeAlias = Sequence[Sequence[HostArray]]


class SegmentAllocator(Protocol):
    """Allocator of segments that all workers of a host map."""

    def free_nbytes(self) -> int:
        """Return the free shared memory of this host in bytes."""

    def open(self, nbytes: int) -> Sequence[HostArray]:
        """Return a new segment of each worker as uint8; all workers call this together.

        Raises ``OSError`` if there is no memory for the segment of this worker.
        """


class _Allocation:
    """Block of this worker's segment, kept alive by the arrays and views over it."""

    def __init__(self, segment: HostArray, offset: int, nbytes: int) -> None:
        self._segment = segment  # which may outlive its group
        address = checks.address(segment) + offset
        self.__array_interface__ = {
            "data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


class SymmetricColumns(NamedTuple):
    """Share of one worker in the reduction of columns of arrays in symmetric memory.

    Each row has one slice of every worker's arrays of a column, in the order of the workers.
    """

    number: int  # hash of the offsets: equal on workers whose arrays are symmetric
    sources: list[list[HostArray]]
    targets: list[list[HostArray]] | None  # None: the targets are the sources


@final
class SymmetricMemory:
    """Allocator and in-place reductions of arrays in the segments of all workers."""

    def __init__(self, rank: int, size: int, segments: SegmentAllocator) -> None:
        self._rank, self._size = rank, size
        self._segments = segments
        self._open: list[tuple[HostArray, ...]] = []  # by segment: the bytes of every worker
        self._holdings: list[Holding] = []  # of this worker's
        self._starts: list[tuple[int, int]] = []  # (own address, segment number), sorted
        self._free: list[tuple[int, int]] = []  # (offset, nbytes), sorted, none adjacent
        self._blocks: dict[int, tuple[int, int]] = {}  # by block number: (offset, nbytes)
        self._number = 0
        self._dropped: deque[int] = deque()  # block numbers; appended by finalizers of any thread
        self._located: dict[tuple[object, ...], SymmetricColumns | None] = {}
        self._unused: set[int] = set()  # block numbers without an array of this worker

    @property
    def is_open(self) -> bool:
        """Whether a segment has been allocated: the same on all workers."""
        return bool(self._open)

    def allocate(self, nbytes: int) -> list[HostArray]:
        """Return cleared memory of each worker, outside of all arrays; all call this together."""
        return [*self._segments.open(nbytes)]

    # -- allocation -------------------------------------------------------------------------------

    def empty(
        self, agree: Agree, shape: tuple[int, ...], dtype: np.dtype[Any], count: int
    ) -> list[HostArray]:
        """Return ``count`` new arrays; all workers call this, and only the counts may differ.

        ``agree`` is ``Workers.agree``.

        Raises
        ------
        DeviceError
            The host has too little shared memory. Raised on all workers.
        """
        while self._dropped:
            self._unused.add(self._dropped.popleft())
        free = self._segments.free_nbytes()
        reports = agree([count, free, *sorted(self._unused)], "empty", Spec(shape, dtype))
        for block in sorted(set.intersection(*(set(each[2:]) for each in reports))):
            self._unused.remove(block)
            self._release(*self._blocks.pop(block))
        most, least = max(each[0] for each in reports), min(each[1] for each in reports)
        nbytes = math.prod(shape) * dtype.itemsize
        block_nbytes = -(-max(1, nbytes) // _LINE) * _LINE
        needed = most * block_nbytes
        if needed and not any(length >= needed for _, length in self._free):
            segment_nbytes = max(_MIN_SEGMENT_NBYTES, needed)
            segment_nbytes = segment_nbytes if segment_nbytes * self._size <= least else needed
            if segment_nbytes > _MAX_SEGMENT_NBYTES or segment_nbytes * self._size > least:
                raise DeviceError(
                    f"empty: {most} arrays of {Spec(shape, dtype)} on each of {self._size} workers "
                    f"of a host need {needed * self._size} bytes of shared memory, "
                    f"and its /dev/shm has {least} left; {available.REMEDY}, or use numpy.empty"
                )
            self._extend(agree, segment_nbytes)
        arrays = [self._allocate(block_nbytes, nbytes, shape, dtype) for _ in range(most)]
        return arrays[:count]

    def _extend(self, agree: Agree, nbytes: int) -> None:
        found: tuple[HostArray, ...] = ()
        text = "of another worker"
        try:
            found = tuple(self._segments.open(nbytes))
        except OSError as error:  # others of this host have taken what was free
            text = str(error)
        if not all(is_open for (is_open,) in agree([bool(found)], "empty, its memory")):
            raise DeviceError(
                f"empty: a worker did not get {nbytes} bytes of shared memory, which were free "
                f"just before ({text}); {available.REMEDY}, or use numpy.empty"
            )
        bisect.insort(self._starts, (checks.address(found[self._rank]), len(self._open)))
        self._release(len(self._open) * _MAX_SEGMENT_NBYTES, nbytes)
        self._open.append(found)
        self._holdings.append(Holding("cpu:0", "staging", nbytes))
        self._located.clear()

    def _allocate(
        self, block_nbytes: int, nbytes: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> HostArray:
        """Return an array in the first free block that is large enough (first fit)."""
        k = next(k for k, (_, length) in enumerate(self._free) if length >= block_nbytes)
        offset, length = self._free[k]
        self._free[k : k + 1] = (
            [(offset + block_nbytes, length - block_nbytes)] if length > block_nbytes else []
        )
        number, self._number = self._number, self._number + 1
        self._blocks[number] = offset, block_nbytes
        segment, offset = divmod(offset, _MAX_SEGMENT_NBYTES)
        block = _Allocation(self._open[segment][self._rank], offset, nbytes)
        weakref.finalize(block, self._dropped.append, number).atexit = False
        return np.asarray(block).view(dtype).reshape(shape)

    def _release(self, offset: int, nbytes: int) -> None:
        """Free a block, and merge it with adjacent free blocks."""
        k = bisect.bisect(self._free, (offset, nbytes))
        stop = offset + nbytes
        if k < len(self._free) and self._free[k][0] == stop:
            stop += self._free.pop(k)[1]
        if k and sum(self._free[k - 1]) == offset:
            offset = self._free.pop(k - 1)[0]
            k -= 1
        self._free.insert(k, (offset, stop - offset))

    # -- reduction --------------------------------------------------------------------------------

    def locate(self, columns: Columns, num_sources: int) -> SymmetricColumns | None:
        """Return the location of flat arrays: columns of [*sources, *targets], of one dtype.

        None if an array is outside of symmetric memory, or an element would be written twice.
        """
        # Cached: the same arrays come in every step, and locating them takes longer than a round.
        addresses = [checks.address(array) for column in columns for array in column]
        lengths = [column[0].size for column in columns]
        key = (num_sources, columns[0][0].dtype, *lengths, *addresses)
        if key not in self._located:
            if len(self._located) == _MAX_LOCATED:
                self._located.clear()
            self._located[key] = self._locate(columns, num_sources, addresses)
        return self._located[key]

    def _locate(
        self, columns: Columns, num_sources: int, addresses: Sequence[int]
    ) -> SymmetricColumns | None:
        nbytes = [column[0].nbytes for column in columns]
        width = len(columns[0])
        found = [self._offset_of(at, nbytes[k // width]) for k, at in enumerate(addresses)]
        offsets = [offset for offset in found if offset is not None]
        if len(offsets) < len(found):
            return None
        rows = [offsets[k : k + width] for k in range(0, len(offsets), width)]
        sources, targets = [row[:num_sources] for row in rows], [row[num_sources:] for row in rows]
        is_in_place = sources == targets
        written = sorted(
            (offset, offset + count)
            for row, count in zip(targets if is_in_place else rows, nbytes, strict=True)
            for offset in row
        )
        if any(stop > start for (_, stop), (start, _) in itertools.pairwise(written)):
            return None
        dtype = columns[0][0].dtype
        return SymmetricColumns(
            hash((num_sources, *nbytes, *offsets)) & _POSITIVE,
            self._share(sources, nbytes, dtype),
            None if is_in_place else self._share(targets, nbytes, dtype),
        )

    def _offset_of(self, address: int, nbytes: int) -> int | None:
        """Return the offset of an address range; None if it is outside of all segments."""
        k = bisect.bisect(self._starts, (address, len(self._open))) - 1
        if k < 0:
            return None
        start, segment = self._starts[k]
        if address + nbytes > start + len(self._open[segment][self._rank]):
            return None
        return segment * _MAX_SEGMENT_NBYTES + address - start

    def reduce(self, located: SymmetricColumns, op: Reduction) -> None:
        """Reduce this worker's share of all workers' sources into all workers' targets.

        Each element in the order of the workers, and for each worker in the order of its sources.
        """
        if located.targets is None:
            many.all_reduce_many(located.sources, op)
            return
        for reads, writes in zip(located.sources, located.targets, strict=True):
            direct.all_reduce_as("all_reduce", reads, op, writes)

    def _share(
        self, rows: Sequence[Sequence[int]], nbytes: Sequence[int], dtype: np.dtype[Any]
    ) -> list[list[HostArray]]:
        """Return this worker's share of all workers' arrays at some offsets, one row per column.

        The cache lines of all columns are divided evenly between the workers, so with many short
        arrays a worker gets most of them whole or not at all.
        """
        lines = [-(-count // _LINE) for count in nbytes]
        low, high = partition.bounds(sum(lines), self._size, self._rank)
        found, begin = [], 0
        for offsets, count, length in zip(rows, lines, nbytes, strict=True):
            first, last = max(low - begin, 0), min(high - begin, count)
            if first < last:
                here = first * _LINE, min(last * _LINE, length)
                found.append(self._views_of_all(offsets, *here, dtype))
            begin += count
        return found

    def _views_of_all(
        self, offsets: Sequence[int], start: int, stop: int, dtype: np.dtype[Any]
    ) -> list[HostArray]:
        """Return bytes ``start`` to ``stop`` of every worker's arrays at some offsets."""
        where = [divmod(offset, _MAX_SEGMENT_NBYTES) for offset in offsets]
        return [
            self._open[segment][member][offset + start : offset + stop].view(dtype)
            for member in range(self._size)
            for segment, offset in where
        ]
