"""Builder of batches: stacks elements along a new leading axis as they are pulled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dvkernels.data.array_nest import Element, as_array
from dvkernels.data.buffer_pool import BufferPool
from dvkernels.data.checks import unexpected
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import DatasetError
from dvkernels.pytree import Structure, describe_structure, flatten, leaf_names

__all__: list[str] = []

# Allocated at first for one leaf, since a sequential source may end long before a batch is full.
_INITIAL_BYTES = 2**26
# Smaller memory is used again by the allocator, without page faults.
_LARGE_NBYTES = 2**17
# Types that are leaves for certain: asking optree takes longer than copying a short row.
_LEAF_TYPES = frozenset({np.ndarray, bool, int, float, complex, *np.sctypeDict.values()})


class BatchBuilder:
    """Builder that stacks elements of one structure along a new leading axis.

    Each element is copied when it is added, which costs as much as stacking all of them at the
    end, so its producer may reuse its memory at once.

    Parameters
    ----------
    capacity : int
        The largest number of elements.
    pools : list of BufferPool
        Where large batches get their memory, one for each leaf; missing ones are appended.
    """

    __slots__ = ("_capacity", "_columns", "_num_values", "_pools", "_structure", "count")

    def __init__(self, capacity: int, pools: list[BufferPool]) -> None:
        self._capacity = capacity
        self._pools = pools
        self._columns: list[_Column] = []
        self._structure: Structure | None = None
        self._num_values: int | None = None  # _num_values() of the first element
        self.count = 0

    def add(self, element: Element) -> None:
        """Copy one more element.

        Raises
        ------
        DatasetError
            Its structure or the shape of a leaf differs from that of the first element, or a leaf
            is neither an array nor a number.
        """
        num_values = _num_values(element)
        leaves: Sequence[Element]
        if num_values is None or num_values != self._num_values:
            leaves = self._leaves(element)
        else:
            leaves = element if num_values else (element,)
        for column, leaf in zip(self._columns, leaves, strict=True):
            column.add(leaf, self.count)
        self.count += 1

    def _leaves(self, element: Element) -> list[Any]:
        leaves, structure = flatten(element)
        if self._structure is None:
            self._structure = structure
            self._num_values = _num_values(element)
            names = leaf_names(element, "element")
            while len(self._pools) < len(names):
                self._pools.append(BufferPool())
            self._columns = [
                _Column(name, self._capacity, pool)
                for name, pool in zip(names, self._pools, strict=False)
            ]
        elif structure != self._structure:
            raise DatasetError(
                "batch: expected the elements of a batch to have one structure; got "
                f"{describe_structure(self._structure)} for its element 0 and "
                f"{describe_structure(structure)} for its element {self.count}; "
                "make them alike with map()"
            )
        return leaves

    def build(self) -> Element:
        """Return the batch of one or more elements; may be called once."""
        assert self._structure is not None
        return self._structure.unflatten([column.build(self.count) for column in self._columns])


class _Column:
    """Rows of one leaf of the batch."""

    __slots__ = (
        "_capacity", "_dtype", "_memory", "_mixed", "_name", "_pool", "_rows", "_shape",
    )  # fmt: skip

    def __init__(self, name: str, capacity: int, pool: BufferPool) -> None:
        self._name = name
        self._capacity = capacity
        self._pool = pool
        self._memory: HostArray | None = None  # of the rows, if it is the pool's
        self._shape: tuple[int, ...] | None = None
        self._dtype: np.dtype[Any] | None = None
        self._rows: HostArray = np.empty(0)
        self._mixed: list[HostArray] | None = None  # the rows, once their dtypes differ

    def add(self, leaf: Any, row: int) -> None:
        array = leaf if type(leaf) is np.ndarray else self._row(leaf, row)
        if self._shape is None:
            self._begin(array)
        elif array.shape != self._shape:
            raise DatasetError(
                f"batch: expected one shape to stack; got {self._shape} for {self._name} of "
                f"element 0 of the batch and {array.shape} for that of element {row}; pad or "
                "crop with map(), or pass drop_remainder=True to an earlier batch()"
            )
        if self._mixed is None and array.dtype == self._dtype:
            if row == len(self._rows):
                capacity = min(2 * row, self._capacity)
                self._rows.resize((capacity, *array.shape), refcheck=False)  # not shared yet
            self._rows[row, ...] = array  # With an ellipsis, an object is stored as it is.
            return
        if self._mixed is None:
            self._mixed = list(self._rows[:row])
        self._mixed.append(array.copy())

    def build(self, count: int) -> HostArray:
        if self._mixed is not None:
            return self._stacked(self._mixed)
        if self._memory is not None:
            if 2 * count < len(self._rows):
                return self._rows[:count].copy()
            self._pool.give_back(self._memory)
            return self._rows[:count]
        if count < len(self._rows):
            self._rows.resize((count, *self._rows.shape[1:]), refcheck=False)
        return self._rows

    def _stacked(self, rows: list[HostArray]) -> HostArray:
        """Stack rows of several dtypes, if one dtype represents all of them exactly."""
        batch = np.stack(rows)
        kinds = {array.dtype.kind for array in rows}
        becomes_text = batch.dtype.kind in "SU" and not kinds <= {"S", "U"}
        if becomes_text or (batch.dtype.kind == "f" and kinds <= {"b", "i", "u"}):
            dtypes = ", ".join(sorted({str(array.dtype) for array in rows}))
            raise DatasetError(
                f"batch: expected rows that one dtype holds as they are; got {dtypes} for "
                f"{self._name}, of which NumPy would make {batch.dtype}; convert them with map()"
            )
        return batch

    def _begin(self, array: HostArray) -> None:
        self._shape, self._dtype = array.shape, array.dtype
        capacity = max(1, min(self._capacity, _INITIAL_BYTES // max(1, array.nbytes)))
        # The dtype of a batch is NumPy's result type of its rows, in native byte order.
        dtype = np.result_type(array.dtype, array.dtype)
        shape, nbytes = (capacity, *array.shape), capacity * array.nbytes
        if nbytes < _LARGE_NBYTES or capacity < self._capacity or dtype.kind not in "biufcmM":
            self._rows = np.empty(shape, dtype)
        else:
            self._memory = self._pool.take(nbytes)
            self._rows = np.ndarray(shape, dtype, self._memory)

    def _row(self, leaf: Any, row: int) -> HostArray:
        if type(leaf) in (int, float) and -(2**63) <= leaf < 2**63:
            return np.asarray(leaf)
        where = f"{self._name} of element {row} of the batch"
        array = as_array(leaf, "batch", where)
        if array.dtype == object and not hasattr(leaf, "dtype"):
            remedy = "turn it into an array with map()"
            raise unexpected("batch", "arrays or numbers to stack", leaf, remedy, f", as {where}")
        if isinstance(leaf, str | bytes) and leaf[-1:] in ("\0", b"\0"):
            raise DatasetError(
                f"batch: expected text or bytes that NumPy keeps as they are; {where} ends with "
                f"{leaf[-20:]!r}, and arrays of NumPy drop zeros there; turn it into an array of "
                "numbers with map(), as np.frombuffer(leaf, np.uint8) does"
            )
        return array


def _num_values(element: Element) -> int | None:
    """Return the number of leaves of a plain tuple, 0 for a bare leaf; None for other pytrees."""
    kind = type(element)
    if kind in _LEAF_TYPES:
        return 0
    if kind is not tuple or not all([type(leaf) in _LEAF_TYPES for leaf in element]):
        return None
    return len(element) or None


def stack(
    elements: Iterable[Element], capacity: int, pools: list[BufferPool] | None = None
) -> Element:
    """Stack at most ``capacity`` elements along a new leading axis; None if there are none."""
    batch = BatchBuilder(capacity, [] if pools is None else pools)
    for element in elements:
        batch.add(element)
    return batch.build() if batch.count else None


def batches(elements: Iterator[Element], size: int, drops_remainder: bool) -> Iterator[Element]:
    """Yield the elements in batches of ``size``, the last one perhaps shorter, or dropped then."""
    pools: list[BufferPool] = []
    while True:
        batch = BatchBuilder(size, pools)
        for element in itertools.islice(elements, size):
            batch.add(element)
        if not batch.count or (batch.count < size and drops_remainder):
            return
        yield batch.build()
