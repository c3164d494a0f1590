"""A batch in the making: elements are copied into it as they are pulled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dvkernels.data.array_nest import as_array, flatten, leaf_names
from dvkernels.errors import DatasetError
from dvkernels.nest import words_of
from dvkernels.user_errors import shown

__all__ = ["Stack", "stack"]

Array = np.ndarray[Any, Any]

# A sequential source may end long before a batch is full: more room than this is taken as needed.
_ROOM_BYTES = 2**26
# What is surely no container: asking optree takes longer than copying a short row.
_VALUES = frozenset({np.ndarray, bool, int, float, complex, *np.sctypeDict.values()})


class Stack:
    """Elements of one structure, stacked along a new leading axis.

    Each is copied when it comes, which costs what stacking them all at the end does. So whoever
    made it may use its memory again at once.

    Parameters
    ----------
    capacity : int
        The most elements there will be.
    """

    __slots__ = ("_capacity", "_columns", "_num_values", "_structure", "count")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._columns: list[_Column] = []
        self._structure: Any = None
        self._num_values: int | None = None  # of each element, as _num_values() says
        self.count = 0

    def add(self, element: Any) -> None:
        """Copy one more element.

        Raises
        ------
        DatasetError
            Its structure or the shape of a leaf is not that of the first, or a leaf is no array
            and no number.
        """
        num_values = _num_values(element)
        leaves: Sequence[Any]
        if num_values is None or num_values != self._num_values:
            leaves = self._leaves(element)
        else:
            leaves = element if num_values else (element,)
        for column, leaf in zip(self._columns, leaves, strict=True):
            column.add(leaf, self.count)
        self.count += 1

    def _leaves(self, element: Any) -> list[Any]:
        leaves, structure = flatten(element)
        if self._structure is None:
            self._structure = structure
            self._num_values = _num_values(element)
            names = leaf_names(element, "element")
            self._columns = [_Column(name, self._capacity) for name in names]
        elif structure != self._structure:
            raise DatasetError(
                "batch: expected the elements of a batch to have one structure; got "
                f"{words_of(self._structure)} for its element 0 and {words_of(structure)} for its "
                f"element {self.count}; make them alike with map()"
            )
        return leaves

    def finished(self) -> Any:
        """Return the batch of one or more elements; to be called once."""
        return self._structure.unflatten([column.finished(self.count) for column in self._columns])


class _Column:
    """The rows of one leaf."""

    __slots__ = ("_capacity", "_dtype", "_mixed", "_name", "_rows", "_shape")

    def __init__(self, name: str, capacity: int) -> None:
        self._name = name
        self._capacity = capacity
        self._shape: tuple[int, ...] | None = None
        self._dtype: Any = None
        self._rows: Array = np.empty(0)
        self._mixed: list[Array] | None = None  # rows of several dtypes

    def add(self, leaf: Any, place: int) -> None:
        array = leaf if type(leaf) is np.ndarray else self._row(leaf, place)
        if self._shape is None:
            self._begin(array)
        elif array.shape != self._shape:
            raise DatasetError(
                f"batch: expected one shape to stack; got {self._shape} for {self._name} of "
                f"element 0 of the batch and {array.shape} for that of element {place}; pad or "
                "crop with map(), or pass drop_remainder=True to an earlier batch()"
            )
        if self._mixed is None and array.dtype == self._dtype:
            if place == len(self._rows):
                room = min(2 * place, self._capacity)
                self._rows.resize((room, *array.shape), refcheck=False)  # nobody has seen it yet
            self._rows[place, ...] = array  # with an ellipsis, an object goes in as it is
            return
        if self._mixed is None:
            self._mixed = list(self._rows[:place])
        self._mixed.append(array.copy())

    def finished(self, count: int) -> Array:
        if self._mixed is not None:
            return self._stacked(self._mixed)
        if count < len(self._rows):
            self._rows.resize((count, *self._rows.shape[1:]), refcheck=False)
        return self._rows

    def _stacked(self, rows: list[Array]) -> Array:
        """Stack rows of several dtypes, if there is one that holds them all as they are."""
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

    def _begin(self, array: Array) -> None:
        self._shape, self._dtype = array.shape, array.dtype
        room = max(1, min(self._capacity, _ROOM_BYTES // max(1, array.nbytes)))
        # The dtype of a batch is what NumPy makes of those of its rows: in native byte order.
        self._rows = np.empty((room, *array.shape), np.result_type(array.dtype, array.dtype))

    def _row(self, leaf: Any, place: int) -> Array:
        if type(leaf) in (int, float) and -(2**63) <= leaf < 2**63:
            return np.asarray(leaf)
        where = f"{self._name} of element {place} of the batch"
        array = as_array(leaf, "batch", where)
        if array.dtype == object and not hasattr(leaf, "dtype"):
            raise DatasetError(
                f"batch: expected arrays or numbers to stack; got {shown(leaf)}, a "
                f"{type(leaf).__name__}, as {where}; turn it into an array with map()"
            )
        if isinstance(leaf, str | bytes) and leaf[-1:] in ("\0", b"\0"):
            raise DatasetError(
                f"batch: expected text or bytes that NumPy keeps as they are; {where} ends with "
                f"{leaf[-20:]!r}, and arrays of NumPy drop zeros there; turn it into an array of "
                "numbers with map(), as np.frombuffer(leaf, np.uint8) does"
            )
        return array


def _num_values(element: Any) -> int | None:
    """Return how many values a plain tuple holds, 0 for a bare value; None for other nests."""
    kind = type(element)
    if kind in _VALUES:
        return 0
    if kind is not tuple or not all([type(leaf) in _VALUES for leaf in element]):
        return None
    return len(element) or None


def stack(elements: Iterable[Any], capacity: int) -> Any:
    """Stack the elements (one or more, at most ``capacity``) along a new leading axis."""
    made = Stack(capacity)
    for element in elements:
        made.add(element)
    return made.finished()
