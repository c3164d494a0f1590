"""Bucketing: many arrays packed into few all-reduces, as is usual for gradients."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators.base import Communicator
from dvkernels.communicators.hierarchical import Hierarchical
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array
from dvkernels.reduce_op import Reduction

__all__: list[str] = []

Column = Sequence[Array]  # one array per local rank


@final
class Bucketing:
    """Communicator that packs the all-reduces of many arrays into buckets.

    Workers that share memory reduce many columns in one pass and need no buckets. Elsewhere packing
    copies every byte twice; it pays where the latency of a collective exceeds its transfer time.
    Kernels within one process start in a microsecond, so they pack only on request.

    Parameters
    ----------
    communicator : Communicator
        Carries out the all-reduce of each bucket.
    bytes_per_bucket : int
        The capacity of a bucket per rank, for arrays of one dtype. A larger array is reduced
        alone, without a copy.
    """

    def __init__(self, communicator: Communicator, bytes_per_bucket: int) -> None:
        self.communicator = communicator
        self._nbytes = bytes_per_bucket

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.communicator.size

    def all_reduce_many(
        self, columns: Sequence[Column], op: Reduction, outs: Sequence[Column] | None = None
    ) -> list[list[Array]]:
        """Return the all-reduce of each column, in the arrays of ``outs`` where they are given.

        New arrays of one bucket share a buffer.
        """
        if isinstance(self.communicator, Hierarchical):
            all_results = self.communicator.all_reduce_many(columns, op, outs)
            if all_results is not None:
                return all_results
        results: list[list[Array]] = [[]] * len(columns)
        for bucket in self._buckets(columns):
            if len(bucket) == 1:
                (k,) = bucket
                out = None if outs is None else outs[k]
                results[k] = self.communicator.all_reduce(columns[k], op, out)
                continue
            packed = [
                _pack([columns[k][rank] for k in bucket]) for rank in range(len(columns[bucket[0]]))
            ]
            reduced = self.communicator.all_reduce(packed, op)
            start = 0
            for k in bucket:
                shape = columns[k][0].shape
                stop = start + math.prod(shape)
                like = columns[k] if outs is None else outs[k]
                parts = [
                    _unpack(flat[start:stop], array).reshape(shape)
                    for flat, array in zip(reduced, like, strict=True)
                ]
                results[k] = parts if outs is None else _copy_into(outs[k], parts)
                start = stop
        return results

    def _buckets(self, columns: Sequence[Column]) -> Iterator[list[int]]:
        """Yield the column indices of each bucket; every column is in one bucket."""
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
        self, values: Sequence[Array], op: Reduction, out: Sequence[Array] | None = None
    ) -> list[Array]:
        """Reduce one array, without packing."""
        return self.communicator.all_reduce(values, op, out)

    def reduce(self, values: Sequence[Array], op: Reduction) -> Any:
        """Reduce into one new array."""
        return self.communicator.reduce(values, op)

    def reduce_scatter(self, values: Sequence[Array], op: Reduction) -> list[Array]:
        """Reduce each rank's part into a new array."""
        return self.communicator.reduce_scatter(values, op)

    def all_gather(self, values: Sequence[Array], axis: int) -> list[Array]:
        """Concatenate into a new array for each rank."""
        return self.communicator.all_gather(values, axis)

    def broadcast(self, values: Sequence[Array], root: int) -> list[Array]:
        """Copy the root's value for every rank."""
        return self.communicator.broadcast(values, root)


def _pack(arrays: Sequence[Array]) -> Any:
    """Return the concatenation of arrays, on a GPU if one of them is there.

    Buckets do not depend on where arrays are stored, which may differ between workers.
    """
    first = next((array for array in arrays if not isinstance(array, np.ndarray)), arrays[0])
    memory = array_memory.holding(first)
    flat = [memory.to_device_of(array, first).reshape(-1) for array in arrays]
    return memory.apply(lambda *parts: np.concatenate(parts), *flat)


def _unpack(part: Any, array: Any) -> Any:
    """Return a part of a bucket in the memory (host or GPU) of ``array``."""
    if isinstance(array, np.ndarray):
        return array_memory.holding(part).to_host(part)
    return array_memory.holding(array).to_device_of(part, array)


def _copy_into(targets: Sequence[Array], values: Sequence[Array]) -> list[Array]:
    """Copy each value into its target, both in the same memory, and return the targets."""
    for target, value in zip(targets, values, strict=True):
        array_memory.holding(target).apply(operator.setitem, target, ..., value)
    return [*targets]
