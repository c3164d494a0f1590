"""Slices of the arrays of collectives that split or join along an axis, for both twins.

Each function returns groups of arrays: the arrays that are read, then those that receive them.
"""

from __future__ import annotations

from collections.abc import Sequence

from dvkernels.devices.array_spec import HostArray

__all__ = ["exchanged", "gathered", "joined_shape", "scattered"]

Parts = Sequence[tuple[int, int]]


def scattered(
    reads: Sequence[HostArray], parts: Parts, writes: Sequence[HostArray]
) -> list[list[HostArray]]:
    """Return, for each part along axis 0, that slice of every array and the part's result."""
    return [
        [*(read[start:stop] for read in reads), write]
        for (start, stop), write in zip(parts, writes, strict=True)
    ]


def joined_shape(reads: Sequence[HostArray], axis: int) -> tuple[int, ...]:
    """Return the shape of the concatenation along an axis."""
    shape = reads[0].shape
    return (*shape[:axis], sum(read.shape[axis] for read in reads), *shape[axis + 1 :])


def gathered(
    reads: Sequence[HostArray], axis: int, writes: Sequence[HostArray]
) -> list[list[HostArray]]:
    """Return each array and its slice of every concatenation along an axis."""
    before = (slice(None),) * axis
    groups = []
    start = 0
    for read in reads:
        index = (*before, slice(start, start + read.shape[axis]))
        groups.append([read, *(write[index] for write in writes)])
        start += read.shape[axis]
    return groups


def exchanged(
    reads: Sequence[HostArray], parts: Parts, writes: Sequence[HostArray]
) -> list[list[HostArray]]:
    """Return part i of array j and the j-th slice of result i, for all i and j."""
    return [
        [read[start:stop], write[k * (stop - start) : (k + 1) * (stop - start)]]
        for (start, stop), write in zip(parts, writes, strict=True)
        for k, read in enumerate(reads)
    ]
