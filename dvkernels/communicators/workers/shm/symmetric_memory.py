"""Memory in which the workers of one host see each other's arrays, so that nothing is staged.

Every worker has a segment of its own and sees those of all. Arrays are made by all workers
together, at the same place of each one's segment: where the own one lies, the others' are known.
A block is taken again when no worker has an array in it any more; they tell each other of that
whenever they make new ones.
"""

from __future__ import annotations

import bisect
import itertools
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, final

import numpy as np

from dvkernels.communicators.workers.shm import available
from dvkernels.devices.buffers import Spec
from dvkernels.errors import DeviceError
from dvkernels.kernels import checks
from dvkernels.kernels.cpu import direct, many
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition

__all__: list[str] = []

_LINE = 64
_SEGMENT_NBYTES = 16 * 1024 * 1024  # at least: windows of MPI are few and large
_MOST_NBYTES = 1 << 44  # of a segment; a place in all segments is one number
_POSITIVE = (1 << 62) - 1
_MOST_KNOWN = 256

Agree = Callable[..., list[list[int]]]


class SegmentAllocator(Protocol):
    """What makes memory that the workers of a host share."""

    def free_nbytes(self) -> int:
        """Return how much this host has left for all of them."""

    def open(self, nbytes: int) -> Sequence[Any]:
        """Return a new segment of each worker, as bytes; all workers call this together."""


class _Allocation:
    """Some bytes of the own segment; arrays made of it keep it alive, and views of those."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {
            "data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


class SymmetricColumns(NamedTuple):
    """Columns of arrays in a window: this worker's share of those of all workers.

    Of each column a part of all workers' arrays, those of the first worker first.
    """

    number: int  # equal only on workers on which all lie alike
    sources: list[list[Any]]
    targets: list[list[Any]] | None  # None: the sources


@final
class SymmetricMemory:
    """One worker's view of the segments of all.

    Parameters
    ----------
    rank, size : int
        This worker, and how many share the memory.
    segments : SegmentAllocator
    """

    def __init__(self, rank: int, size: int, segments: SegmentAllocator) -> None:
        self._rank, self._size = rank, size
        self._segments = segments
        self._open: list[tuple[Any, ...]] = []  # of each segment, the bytes of every worker
        self._starts: list[tuple[int, int]] = []  # the own ones' addresses, sorted, and which
        self._free: list[tuple[int, int]] = []  # places, sorted, none adjacent
        self._taken: dict[int, tuple[int, int]] = {}  # blocks by number: place, nbytes
        self._number = 0
        self._dropped: deque[int] = deque()  # blocks; from any thread, at any moment
        self._known: dict[Any, SymmetricColumns | None] = {}
        self._told: set[int] = set()  # blocks that no array of this worker lies in

    @property
    def is_open(self) -> bool:
        """Whether there may be arrays in it: the same on all workers."""
        return bool(self._open)

    # -- making arrays ---------------------------------------------------------------------------

    def empty(self, agree: Agree, shape: tuple[int, ...], dtype: Any, count: int) -> list[Any]:
        """Return ``count`` new arrays; all workers call this alike, but for the count.

        ``agree`` is that of the workers.

        Raises
        ------
        DeviceError
            The host has not enough memory that processes can share: on all workers.
        """
        while self._dropped:
            self._told.add(self._dropped.popleft())
        free = self._segments.free_nbytes()
        told = agree([count, free, *sorted(self._told)], "empty", Spec(shape, dtype))
        for block in sorted(set.intersection(*(set(each[2:]) for each in told))):
            self._told.remove(block)
            self._give_back(*self._taken.pop(block))
        most, least = max(each[0] for each in told), min(each[1] for each in told)
        nbytes = math.prod(shape) * dtype.itemsize
        room = -(-max(1, nbytes) // _LINE) * _LINE
        needed = most * room
        if needed and not any(length >= needed for _, length in self._free):
            wanted = max(_SEGMENT_NBYTES, needed)
            wanted = wanted if wanted * self._size <= least else needed
            if wanted > _MOST_NBYTES or wanted * self._size > least:
                raise DeviceError(
                    f"empty: {most} arrays of {Spec(shape, dtype)} on each of {self._size} workers "
                    f"of a host need {needed * self._size} bytes of memory that processes share, "
                    f"and its /dev/shm has {least} left; {available.REMEDY}, or use numpy.empty"
                )
            self._extend(wanted)
        arrays = [self._made(room, nbytes, shape, dtype) for _ in range(most)]
        return arrays[:count]

    def _extend(self, nbytes: int) -> None:
        found = tuple(self._segments.open(nbytes))
        bisect.insort(self._starts, (checks.address(found[self._rank]), len(self._open)))
        self._give_back(len(self._open) * _MOST_NBYTES, nbytes)
        self._open.append(found)
        self._known.clear()

    def _made(self, room: int, nbytes: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array in the first free place that is large enough."""
        k = next(k for k, (_, length) in enumerate(self._free) if length >= room)
        place, length = self._free[k]
        self._free[k : k + 1] = [(place + room, length - room)] if length > room else []
        number, self._number = self._number, self._number + 1
        self._taken[number] = place, room
        segment, offset = divmod(place, _MOST_NBYTES)
        block = _Allocation(checks.address(self._open[segment][self._rank]) + offset, nbytes)
        weakref.finalize(block, self._dropped.append, number).atexit = False
        return np.asarray(block).view(dtype).reshape(shape)

    def _give_back(self, place: int, nbytes: int) -> None:
        """Make a place free, one with free ones that it touches."""
        k = bisect.bisect(self._free, (place, nbytes))
        stop = place + nbytes
        if k < len(self._free) and self._free[k][0] == stop:
            stop += self._free.pop(k)[1]
        if k and sum(self._free[k - 1]) == place:
            place = self._free.pop(k - 1)[0]
            k -= 1
        self._free.insert(k, (place, stop - place))

    # -- reducing them ---------------------------------------------------------------------------

    def place(self, columns: Sequence[Sequence[Any]], num_sources: int) -> SymmetricColumns | None:
        """Return where flat arrays lie: columns of [*sources, *targets], of one dtype.

        None: some lie elsewhere, or an element is to be written twice.
        """
        # The same arrays come step after step, and finding them takes longer than a round.
        addresses = [checks.address(array) for column in columns for array in column]
        lengths = [column[0].size for column in columns]
        key = (num_sources, columns[0][0].dtype, *lengths, *addresses)
        if key not in self._known:
            if len(self._known) == _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._placed(columns, num_sources, addresses)
        return self._known[key]

    def _placed(
        self, columns: Sequence[Sequence[Any]], num_sources: int, addresses: Sequence[int]
    ) -> SymmetricColumns | None:
        nbytes = [column[0].nbytes for column in columns]
        width = len(columns[0])
        places = [self._place_of(at, nbytes[k // width]) for k, at in enumerate(addresses)]
        if None in places:
            return None
        rows = [places[k : k + width] for k in range(0, len(places), width)]
        sources, targets = [row[:num_sources] for row in rows], [row[num_sources:] for row in rows]
        is_in_place = sources == targets
        written = sorted(
            (place, place + count)
            for row, count in zip(targets if is_in_place else rows, nbytes, strict=True)
            for place in row
        )
        if any(stop > start for (_, stop), (start, _) in itertools.pairwise(written)):
            return None
        dtype = columns[0][0].dtype
        return SymmetricColumns(
            hash((num_sources, *nbytes, *places)) & _POSITIVE,
            self._share(sources, nbytes, dtype),
            None if is_in_place else self._share(targets, nbytes, dtype),
        )

    def _place_of(self, address: int, nbytes: int) -> int | None:
        """Return where bytes lie; None: elsewhere."""
        k = bisect.bisect(self._starts, (address, len(self._open))) - 1
        if k < 0:
            return None
        start, segment = self._starts[k]
        if address + nbytes > start + len(self._open[segment][self._rank]):
            return None
        return segment * _MOST_NBYTES + address - start

    def reduce(self, placed: SymmetricColumns, op: Reduction) -> None:
        """Combine this worker's share of all workers' sources into all workers' targets.

        Each element in the order of the workers, and of each worker in that of its sources.
        """
        if placed.targets is None:
            many.all_reduce_many(placed.sources, op)
            return
        for reads, writes in zip(placed.sources, placed.targets, strict=True):
            direct.all_reduce_as("all_reduce", reads, op, writes)

    def _share(self, rows: Sequence[Sequence[Any]], nbytes: Sequence[int], dtype: Any) -> Any:
        """Return a part of the arrays of all workers at some places, a row for each column.

        The cache lines of all columns are dealt out evenly, so of many short arrays a worker has
        most whole or not at all.
        """
        lines = [-(-count // _LINE) for count in nbytes]
        low, high = partition.bounds(sum(lines), self._size, self._rank)
        found, begin = [], 0
        for places, count, length in zip(rows, lines, nbytes, strict=True):
            first, last = max(low - begin, 0), min(high - begin, count)
            if first < last:
                here = first * _LINE, min(last * _LINE, length)
                found.append(self._everyones(places, *here, dtype))
            begin += count
        return found

    def _everyones(self, places: Sequence[int], start: int, stop: int, dtype: Any) -> list[Any]:
        """Return the bytes ``start`` to ``stop`` of each worker's arrays at some places."""
        where = [divmod(place, _MOST_NBYTES) for place in places]
        return [
            self._open[segment][member][offset + start : offset + stop].view(dtype)
            for member in range(self._size)
            for segment, offset in where
        ]
