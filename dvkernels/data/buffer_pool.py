"""Buffer pool: memory of batches, used again once nobody refers to a batch any more.

New memory costs a page fault for every 4 KiB, which takes longer than copying rows into it. A batch
is a view of an array of a pool; views of it, memoryviews and tensors of other libraries all hold a
reference to that array, directly or through each other. So nobody reads an array to which the pool
alone refers: CPython's reference count tells, and nothing has to happen when a batch is dropped, in
whatever thread or process that may be.
"""

from __future__ import annotations

import collections
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from dvkernels.devices.array_spec import HostArray
from dvkernels.profiler import memory_report

__all__: list[str] = []

# The arrays that a pool remembers: those that a deep prefetch queue holds, up to some memory; three
# of any size, one of which is filled while the caller holds the batch before it, or two.
_MOST_ARRAYS = 16
_MOST_NBYTES = 256 * 1024 * 1024
_FEWEST_ARRAYS = 3


class BufferPool:
    """Pool of byte arrays for one leaf of the batches of a node.

    It has no lock: a thread that pops an array is the only one to see it. An array lost to an
    interrupt is freed when its batch is.
    """

    __slots__ = ("__weakref__", "_arrays")

    def __init__(self) -> None:
        self._arrays: collections.deque[HostArray] = collections.deque()
        _pools.add(self)

    def take(self, nbytes: int) -> HostArray:
        """Return an array of at least ``nbytes``, at most twice as many, that nobody refers to."""
        for array in self._unused():
            if nbytes <= array.nbytes <= 2 * nbytes and array.flags.carray:
                return array
            if array.nbytes > nbytes:
                self._arrays.append(array)  # the next batch may need as much
        return np.empty(nbytes, np.uint8)

    def give_back(self, array: HostArray) -> None:
        """Use an array again once nobody else refers to it; no thread may still write to it."""
        arrays = self._arrays
        arrays.append(array)
        most = min(_MOST_ARRAYS, _MOST_NBYTES // max(1, array.nbytes))
        while len(arrays) > max(_FEWEST_ARRAYS, most):
            arrays.popleft()

    @property
    def unused_nbytes(self) -> int:
        """The bytes of the arrays to which nobody else refers."""
        nbytes = 0
        for array in self._unused():
            nbytes += array.nbytes
            self._arrays.append(array)
        return nbytes

    def _unused(self) -> Iterator[HostArray]:
        """Yield each array that nobody else refers to, and remove it."""
        for _ in range(len(self._arrays)):
            try:
                array, num_references = _pop(self._arrays)
            except IndexError:  # another thread has it just now
                return
            if num_references == _NO_OTHERS:
                yield array
            else:
                self._arrays.append(array)

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferPool, ()  # a copy has memory of its own


def _pop(arrays: collections.deque[HostArray]) -> tuple[HostArray, int]:
    """Remove the first array; return it and how many references there are to it."""
    array = arrays.popleft()
    return array, sys.getrefcount(array)


# What it is where there are no other references depends on the version of Python.
_NO_OTHERS = _pop(collections.deque([np.empty(0)]))[1]

_pools: weakref.WeakSet[BufferPool] = weakref.WeakSet()


def _memory_entries() -> Iterator[tuple[str, str, int]]:
    for pool in list(_pools):
        yield "cpu:0", "batches", pool.unused_nbytes


memory_report.register_account(_memory_entries)
