"""The dataset: a description of elements in an order, which computes nothing by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dvkernels.data.ahead import Ahead
from dvkernels.data.cursor import Cursor
from dvkernels.data.node import Length, Node
from dvkernels.data.shuffle import Shuffle
from dvkernels.data.sources import FromArrays, FromIterable, FromSequence, Range, SupportsIndexing
from dvkernels.data.transforms import (
    Batch,
    Filter,
    Map,
    Prefetch,
    Repeat,
    Shard,
    Skip,
    Take,
    prefetch_depth,
)
from dvkernels.errors import DatasetError

__all__ = ["Dataset"]


class Dataset:
    """Elements in an order that depends on the seeds and the epoch alone.

    Made by the ``from_...`` methods and :meth:`range`; every transform returns a new dataset and
    leaves this one as it is. An element is a nest of arrays and numbers: anything ``optree``
    knows (tuples, lists, dicts, named tuples, registered dataclasses).

    Iterating gives the elements of epoch 0, each time anew. An error in user code (a source, a
    function given to :meth:`map` or :meth:`filter`) is re-raised as it is, with a note that
    names index, source and transform; the next ``next()`` tries the same element again.

    Notes
    -----
    Sources other than :meth:`from_iterable`, and all transforms of them but :meth:`filter`, have
    random access: element n is computed from n, so an iterator starts anywhere at once. What is
    sequential is resumed by replaying what lies before.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels.data.dataset import Dataset
    >>> dataset = Dataset.from_arrays((np.arange(5), np.arange(5) ** 2)).batch(3)
    >>> len(dataset)
    2
    >>> for x, y in dataset:
    ...     print(x, y)
    [0 1 2] [0 1 4]
    [3 4] [ 9 16]
    """

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        if not isinstance(node, Node):
            raise DatasetError(
                f"Dataset: expected a node; got a {type(node).__name__}; make datasets with "
                "Dataset.from_arrays, from_sequence, from_iterable or range"
            )
        self._node = node

    @property
    def node(self) -> Node:
        """The last node of the chain, for whoever computes elements."""
        return self._node

    @property
    def length(self) -> Length:
        """The number of elements: ``math.inf`` if endless, None if only iterating can tell."""
        return self._node.length

    @classmethod
    def from_arrays(cls, nest: Any) -> Dataset:
        """Make the rows of one or more arrays of one leading length the elements.

        The arrays are not copied: batches of consecutive rows are read-only views of them.

        Parameters
        ----------
        nest : array or nest of arrays
            Arrays, and what ``numpy.asarray`` reads without a loop (PyTorch CPU tensors).

        Raises
        ------
        DatasetError
            Leading lengths differ, or a leaf is a scalar. The message names the leaves.

        Examples
        --------
        >>> import numpy as np
        >>> list(Dataset.from_arrays({"x": np.array([1.5, 2.5])}))
        [{'x': np.float64(1.5)}, {'x': np.float64(2.5)}]
        """
        return cls(FromArrays(nest))

    @classmethod
    def range(cls, n: int) -> Dataset:
        """Make the integers 0 to n - 1 (int64) the elements.

        Examples
        --------
        >>> [int(element) for element in Dataset.range(3)]
        [0, 1, 2]
        """
        return cls(Range(n))

    @classmethod
    def from_sequence(cls, sequence: SupportsIndexing) -> Dataset:
        """Make ``sequence[0]`` to ``sequence[len(sequence) - 1]`` the elements.

        The length is asked for once, here; the elements are asked for when they are needed, one
        at a time, and in any order.

        Examples
        --------
        >>> list(Dataset.from_sequence("abc"))
        ['a', 'b', 'c']
        """
        return cls(FromSequence(sequence))

    @classmethod
    def from_iterable(cls, factory: Callable[[], Iterable[Any]]) -> Dataset:
        """Make what ``iter(factory())`` yields the elements; sequential.

        Parameters
        ----------
        factory : callable
            Called at the start of each epoch, and again to resume or after an error; returns an
            iterable that yields the same elements each time.

        Examples
        --------
        >>> def lines():
        ...     yield from ("one", "two")
        >>> list(Dataset.from_iterable(lines))
        ['one', 'two']
        """
        return cls(FromIterable(factory))

    def shuffle(self, *, seed: int, reshuffle_each_epoch: bool = True) -> Dataset:
        """Put all elements into an order that is a function of the seed and the epoch.

        Parameters
        ----------
        seed : int
            Any non-negative integer.
        reshuffle_each_epoch : bool
            False for the order of epoch 0 in every epoch.

        Raises
        ------
        DatasetError
            The dataset has no random access, or does not end.

        Notes
        -----
        The whole dataset is shuffled, not a window, in O(1) memory: the index is mapped.

        Examples
        --------
        >>> shuffled = Dataset.range(6).shuffle(seed=1)
        >>> sorted(int(element) for element in shuffled)
        [0, 1, 2, 3, 4, 5]
        """
        return Dataset(Shuffle(self._node, seed, reshuffle_each_epoch))

    def map(
        self, fn: Callable[[Any], Any], *, num_workers: int = 0, workers: str = "threads"
    ) -> Dataset:
        """Replace each element by ``fn(element)``.

        Parameters
        ----------
        fn : callable
            Its qualified name is part of the state of an iterator, so a resume under another name
            is refused.
        num_workers : int
            How many threads or processes share the elements of a batch; 0 calls ``fn`` where the
            batch is asked for. The order is kept.
        workers : {"threads", "processes"}
            Threads gain where ``fn`` releases the interpreter's lock (NumPy on large arrays, Numba
            with ``nogil``, reading files), processes where it does not. Processes are spawned, so
            ``fn`` must be importable, and elements and results are sent to and fro. They are
            started by the first iterator and end with the last.

        Raises
        ------
        DatasetError
            ``fn`` is not callable, or cannot be sent to a process.

        Examples
        --------
        >>> list(Dataset.from_sequence([1, 2]).map(lambda x: 10 * x))
        [10, 20]
        """
        return Dataset(Map(self._node, fn, num_workers, workers))

    def prefetch(self, n: int) -> Dataset:
        """Have iterators hold ``n`` elements ready, which a thread computes.

        The elements, their order and every state stay the same: what is held ready and not
        delivered does not count. Worth it where computing an element releases the interpreter's
        lock, or waits.

        Examples
        --------
        >>> [batch.tolist() for batch in Dataset.range(4).batch(2).prefetch(1)]
        [[0, 1], [2, 3]]
        """
        return Dataset(Prefetch(self._node, n))

    def filter(self, predicate: Callable[[Any], object]) -> Dataset:
        """Keep the elements for which ``predicate(element)`` is true; sequential from here on.

        Examples
        --------
        >>> list(Dataset.from_sequence([1, 2, 3]).filter(lambda x: x != 2))
        [1, 3]
        """
        return Dataset(Filter(self._node, predicate))

    def batch(self, size: int, *, drop_remainder: bool = False) -> Dataset:
        """Stack runs of ``size`` elements along a new leading axis.

        ``drop_remainder=True`` leaves out the last run if it is shorter. Before a dataset is
        distributed this is the global batch, which the replicas share.

        Examples
        --------
        >>> [batch.tolist() for batch in Dataset.range(5).batch(2)]
        [[0, 1], [2, 3], [4]]
        """
        return Dataset(Batch(self._node, size, drop_remainder))

    def repeat(self, count: int | None = None) -> Dataset:
        """Go through the elements ``count`` times, without end for None.

        Each repetition counts as an epoch for what comes before, so ``shuffle(...).repeat(...)``
        reshuffles: repetition r of epoch e is epoch ``e * count + r`` there, and
        ``e * 2**32 + r`` if the repetition is endless. An empty dataset stays empty.

        Examples
        --------
        >>> [int(element) for element in Dataset.range(2).repeat(2)]
        [0, 1, 0, 1]
        """
        return Dataset(Repeat(self._node, count))

    def take(self, n: int) -> Dataset:
        """Keep the first ``n`` elements, all if there are fewer.

        Examples
        --------
        >>> [int(element) for element in Dataset.range(9).take(2)]
        [0, 1]
        """
        return Dataset(Take(self._node, n))

    def skip(self, n: int) -> Dataset:
        """Leave out the first ``n`` elements, all if there are fewer.

        Examples
        --------
        >>> [int(element) for element in Dataset.range(4).skip(2)]
        [2, 3]
        """
        return Dataset(Skip(self._node, n))

    def shard(self, num: int, index: int) -> Dataset:
        """Keep every ``num``-th element, from element ``index`` on.

        The shards 0 to ``num - 1`` together are the dataset, without overlap.

        Examples
        --------
        >>> [int(element) for element in Dataset.range(7).shard(3, 1)]
        [1, 4]
        """
        return Dataset(Shard(self._node, num, index))

    def __iter__(self) -> Iterator[Any]:
        depth = prefetch_depth(self._node)
        return Ahead(self._node, 0, 0, depth) if depth else Cursor(self._node)

    def __len__(self) -> int:
        return known_length(self._node.length)

    def __bool__(self) -> bool:
        # Without this, ``if dataset`` would ask for a length that may not be known.
        return True

    def __repr__(self) -> str:
        return f"Dataset.{self._node!r}"


def known_length(length: Length) -> int:
    """Return ``length`` if it is a number; ``len()`` wants a ``TypeError`` otherwise."""
    if length is None:
        raise TypeError("the length of this dataset is not known before its end is reached")
    if length == math.inf:
        raise TypeError("this dataset is endless; take(n) makes it end")
    return int(length)
