"""Many arrays in few collectives: packed into buckets, as gradients usually are."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators.base import Communicator
from dvkernels.communicators.hierarchical import Hierarchical
from dvkernels.devices import array_memory
from dvkernels.reduce_op import Reduction

__all__: list[str] = []

Column = Sequence[Any]  # one array per local rank


def all_reduce_each(
    communicator: Communicator,
    columns: Iterable[Column],
    op: Reduction,
    outs: Sequence[Column] | None = None,
) -> list[list[Any]]:
    """Return the all-reduce of each column of arrays, in buckets where the communicator packs.

    New arrays, or those of ``outs``, which may be the columns.
    """
    listed = [*columns]
    if isinstance(communicator, Bucketing) and len(listed) > 1:
        return communicator.all_reduce_many(listed, op, outs)
    if outs is None:
        return [communicator.all_reduce(column, op) for column in listed]
    return [
        communicator.all_reduce(column, op, out) for column, out in zip(listed, outs, strict=True)
    ]


@final
class Bucketing:
    """Another communicator, whose all-reduces of many arrays are packed.

    Workers that share memory need no buckets: the memory between them is one. Else packing copies
    every byte twice; it pays where a collective costs more to start than to carry the bucket. The
    kernels of one process start in a microsecond, so they are not packed unless asked.

    Parameters
    ----------
    communicator : Communicator
        Who carries the buckets.
    bytes_per_bucket : int
        Arrays of one dtype are packed up to so many bytes a rank; larger ones go alone, as
        they are.
    """

    def __init__(self, communicator: Communicator, bytes_per_bucket: int) -> None:
        self._carrying = communicator
        self._nbytes = bytes_per_bucket

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._carrying.size

    def all_reduce_many(
        self, columns: Sequence[Column], op: Reduction, outs: Sequence[Column] | None = None
    ) -> list[list[Any]]:
        """Return the all-reduce of each column: new arrays, those of a bucket side by side.

        Or those of ``outs``.
        """
        if isinstance(self._carrying, Hierarchical):
            at_once = self._carrying.all_reduce_many(columns, op, outs)
            if at_once is not None:
                return at_once
        results: list[list[Any]] = [[]] * len(columns)
        for bucket in self._buckets(columns):
            if len(bucket) == 1:
                (k,) = bucket
                out = None if outs is None else outs[k]
                results[k] = self._carrying.all_reduce(columns[k], op, out)
                continue
            packed = [
                _packed([columns[k][rank] for k in bucket])
                for rank in range(len(columns[bucket[0]]))
            ]
            reduced = self._carrying.all_reduce(packed, op)
            start = 0
            for k in bucket:
                shape = columns[k][0].shape
                stop = start + math.prod(shape)
                beside = columns[k] if outs is None else outs[k]
                parts = [
                    _unpacked(flat[start:stop], array).reshape(shape)
                    for flat, array in zip(reduced, beside, strict=True)
                ]
                results[k] = parts if outs is None else _written(outs[k], parts)
                start = stop
        return results

    def _buckets(self, columns: Sequence[Column]) -> Iterator[list[int]]:
        """Yield the columns of each bucket, every column once."""
        filling: dict[Any, list[int]] = {}
        filled: dict[Any, int] = {}
        for k, column in enumerate(columns):
            nbytes, dtype = column[0].nbytes, column[0].dtype
            if nbytes >= self._nbytes:
                yield [k]
                continue
            if filled.get(dtype, 0) + nbytes > self._nbytes:
                yield filling.pop(dtype)
                filled[dtype] = 0
            filling.setdefault(dtype, []).append(k)
            filled[dtype] = filled.get(dtype, 0) + nbytes
        yield from filling.values()

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce one array, as it is."""
        return self._carrying.all_reduce(values, op, out)

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Reduce into one new array."""
        return self._carrying.reduce(values, op)

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Reduce each rank's part into a new array."""
        return self._carrying.reduce_scatter(values, op)

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate into a new array for each rank."""
        return self._carrying.all_gather(values, axis)

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value for every rank."""
        return self._carrying.broadcast(values, root)


def _packed(arrays: Sequence[Any]) -> Any:
    """Return arrays one behind the other: on a GPU, if one of them lies there.

    Which of them share a bucket does not depend on where they lie: that may differ among workers.
    """
    first = next((array for array in arrays if not isinstance(array, np.ndarray)), arrays[0])
    held = array_memory.holding(first)
    flat = [held.near(array, first).reshape(-1) for array in arrays]
    return held.apply(lambda *parts: np.concatenate(parts), *flat)


def _unpacked(part: Any, array: Any) -> Any:
    """Return a part of a bucket, where an array lies."""
    if isinstance(array, np.ndarray):
        return array_memory.holding(part).to_host(part)
    return array_memory.holding(array).near(part, array)


def _written(targets: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Return arrays that each have taken over a value, which lies beside it."""
    for target, value in zip(targets, values, strict=True):
        array_memory.holding(target).apply(operator.setitem, target, ..., value)
    return [*targets]
