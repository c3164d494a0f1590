"""Sources of datasets: arrays, sequences, integer ranges and iterables."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dvkernels.data.array_nest import Element, as_array, is_flat_tuple, outline
from dvkernels.data.buffer_pool import BufferPool
from dvkernels.data.checks import (
    LARGEST,
    check_callable,
    check_count,
    check_flag,
    check_ordered,
    unexpected,
)
from dvkernels.data.node import Indices, Node, add_note, callable_name
from dvkernels.devices.array_spec import HostArray, Spec
from dvkernels.errors import DatasetError
from dvkernels.kernels import backends
from dvkernels.pytree import flatten, leaf_names
from dvkernels.user_errors import brief, text_of

__all__: list[str] = []

# Batches from this size on, which NumPy copies in 75 us, are taken by all cores: a job costs 8 us,
# and sleeping threads are woken for it (2 cores of an AMD EPYC, 2026-11).
_SHARED_NBYTES = 512 * 1024


class SupportsIndexing(Protocol):
    """Map-style sequence of elements 0 to length - 1: lists, PyTorch datasets, grain sources."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class FromArrays(Node):
    """Source of the rows of a pytree of arrays; batches are views or fancy indexing, not loops."""

    random_access = True
    owns_elements = True  # provided that the user does not write to the arrays

    def __init__(self, nest: Element) -> None:
        leaves, self._spec = flatten(nest)
        if not leaves:
            raise DatasetError(
                f"from_arrays: expected a nest with at least one array; got {brief(nest)}; "
                "pass an array, or a tuple or dict of arrays"
            )
        names = leaf_names(nest, "nest")
        self._arrays = [_rows(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        if len({len(array) for array in self._arrays}) > 1:
            lengths = ", ".join(
                f"{name} has {len(array)}" for name, array in zip(names, self._arrays, strict=True)
            )
            raise DatasetError(
                f"from_arrays: expected one leading length; got {lengths} rows; "
                "cut the arrays to one length, or leave out those that do not belong to the rows"
            )
        self.length: int = len(self._arrays[0])
        self._columns = outline(
            self._spec.unflatten(self._arrays), "row", lambda dtype, shape: Spec(shape[1:], dtype)
        )
        self._build: Callable[[list[Any]], Any] = self._spec.unflatten
        if len(leaves) == 1 and leaves[0] is nest:
            self._build = _single_leaf
        elif is_flat_tuple(nest):
            self._build = tuple
        self._row_nbytes = sum(array.nbytes for array in self._arrays) // max(1, self.length)
        self._taker: _Taker | None = None  # made for the first large batch

    def describe(self) -> str:
        return f"from_arrays(length={self.length}, {self._columns})"

    def element(self, index: int, epoch: int) -> Element:
        return self._build([array[index] for array in self._arrays])

    def gather(self, indices: Indices, epoch: int) -> Element:
        if len(indices) * self._row_nbytes < _SHARED_NBYTES:
            return self._build([_rows_of(array, indices) for array in self._arrays])
        if self._taker is None:
            self._taker = _Taker(self._arrays)
        return self._build(self._taker.take(indices))

    def batch(self, start: int, stop: int, epoch: int) -> Element:
        return self._build([array[start:stop] for array in self._arrays])

    def sample(self) -> Iterator[Any]:
        return iter(self._arrays)


class _Taker:
    """Taker of large batches of rows: compiled, on all cores, into memory that is used again."""

    def __init__(self, arrays: Sequence[HostArray]) -> None:
        self._arrays = arrays
        kernel = backends.take()
        chosen = [k for k, array in enumerate(arrays) if kernel.takes(array)]
        self._pools = {k: BufferPool() for k in chosen}
        self._rows = kernel.RowTaker([arrays[k] for k in chosen])

    def take(self, indices: Indices) -> list[HostArray]:
        """Return the rows ``indices`` of each array."""
        count = len(indices)
        views, memory = {}, {}
        for k, pool in self._pools.items():
            array = self._arrays[k]
            shape = (count, *array.shape[1:])
            memory[k] = pool.take(count * (array.nbytes // len(array)))
            views[k] = np.ndarray(shape, array.dtype, memory[k])
        if views:
            self._rows.take_into([*views.values()], indices)
        for k, buffer in memory.items():  # only now, when no thread writes to it any more
            self._pools[k].give_back(buffer)
        return [
            views[k] if k in views else _rows_of(array, indices)
            for k, array in enumerate(self._arrays)
        ]


def _rows_of(array: HostArray, indices: Indices) -> HostArray:
    # take() is about twice as fast as [indices], but copies the whole of a strided array.
    found: HostArray = array.take(indices, axis=0) if array.flags.carray else array[indices]
    return found


class Range(Node):
    """Source of the integers 0 to n - 1, as int64."""

    random_access = True
    owns_elements = True

    def __init__(self, n: int) -> None:
        self.length: int = check_count("range", "n", n, 0)
        if self.length > LARGEST:
            raise DatasetError(f"range: expected n of at most 2**62; got {n}; index in two levels")

    def describe(self) -> str:
        return f"range({self.length})"

    def sample(self) -> Iterator[Any]:
        return iter(())

    def element(self, index: int, epoch: int) -> np.int64:
        return np.int64(index)

    def gather(self, indices: Indices, epoch: int) -> Indices:
        return np.array(indices, np.int64)

    def batch(self, start: int, stop: int, epoch: int) -> Indices:
        return np.arange(start, stop, dtype=np.int64)


class FromSequence(Node):
    """Source of the elements of a sequence with ``__len__`` and ``__getitem__``."""

    random_access = True

    def __init__(self, sequence: SupportsIndexing) -> None:
        indexable = hasattr(sequence, "__len__") and hasattr(sequence, "__getitem__")
        if not indexable or isinstance(sequence, Mapping | type):
            raise DatasetError(
                "from_sequence: expected an object with __len__ and __getitem__(index); got a "
                f"{type(sequence).__name__}; use from_iterable(factory) for what can only be "
                "iterated, from_arrays(nest) for a dict of arrays"
            )
        self._sequence = sequence
        self.length: int = length_of(sequence, "from_sequence")

    def describe(self) -> str:
        return f"from_sequence(length={self.length})"

    def element(self, index: int, epoch: int) -> Element:
        try:
            return self._sequence[index]
        except Exception as error:
            add_note(error, f"{type(self._sequence).__name__}.__getitem__", self, index, epoch)
            raise


def length_of(sequence: SupportsIndexing, verb: str) -> int:
    """Return the length of a user's sequence; :class:`DatasetError` if ``__len__`` is wrong."""
    length: object = sequence.__len__()  # len() would raise errors of its own
    return check_count(
        verb, f"the length of the {type(sequence).__name__}", length, 0, "mend __len__"
    )


class FromIterable(Node):
    """Sequential source that iterates a new iterable from ``factory`` in each epoch."""

    random_access = False
    length = None

    def __init__(self, factory: Callable[..., Iterable[Element]], takes_epoch: bool) -> None:
        check_flag("from_iterable", "epoch", takes_epoch)
        check_callable(
            "from_iterable",
            factory,
            "pass what makes a new iterable on each call: from_iterable(lambda: iterable); an "
            "iterator or generator is used up after one epoch and cannot be resumed",
        )
        self._factory = factory
        self._takes_epoch = takes_epoch
        self._latest: object = None  # The latest iterator, to detect one that is returned twice.

    def describe(self) -> str:
        epoch = ", epoch=True" if self._takes_epoch else ""
        return f"from_iterable({callable_name(self._factory)}{epoch})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        index = 0
        iterator: Iterator[Element] | None = None
        try:
            iterator = self._begin(epoch)
            for element in iterator:
                if index >= start:
                    yield element
                index += 1
        except DatasetError:
            raise
        except Exception as error:
            add_note(error, callable_name(self._factory), self, index, epoch)
            raise
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    def _begin(self, epoch: int) -> Iterator[Element]:
        iterable: object = self._factory(epoch) if self._takes_epoch else self._factory()
        if not isinstance(iterable, Iterable):
            wanted, remedy = "the factory to return an iterable", "write it as a generator function"
            raise unexpected("from_iterable", wanted, iterable, remedy)
        check_ordered("from_iterable", "what the factory returns", iterable)
        if not isinstance(iterable, Iterator):
            return iter(iterable)
        if iterable is self._latest:
            raise DatasetError(
                "from_iterable: expected the factory to return a new iterable each time; got "
                f"the same {type(iterable).__name__} again, which is used up; "
                "make the iterator inside the factory"
            )
        self._latest = iterable
        return iterable


def _rows(name: str, leaf: object) -> HostArray:
    """Return a read-only view of ``leaf``, so that nobody writes to the source by accident."""
    try:
        array = as_array(leaf, "from_arrays", name)
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(
            f"from_arrays: expected an array as {name}; got a {type(leaf).__name__} that NumPy "
            f"cannot read ({text_of(error)}); convert it to a NumPy array first"
        ) from error
    if array.ndim == 0:
        remedy = "lists are containers here, so wrap numbers in np.asarray"
        raise unexpected("from_arrays", f"an array with a leading axis as {name}", leaf, remedy)
    view = array.view()
    view.flags.writeable = False
    return view


def _single_leaf(leaves: list[Any]) -> Any:
    return leaves[0]
