"""Dataset: the lazy description of a pipeline, which computes nothing by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from dvkernels import html_table
from dvkernels.data.array_nest import Element
from dvkernels.data.batch import Batch
from dvkernels.data.checks import check_count, unexpected
from dvkernels.data.constructors import DatasetConstructors
from dvkernels.data.cursor import EpochPosition
from dvkernels.data.file_source import FileList
from dvkernels.data.filter import Filter
from dvkernels.data.map import Map
from dvkernels.data.node import Length, Node
from dvkernels.data.prefetch import Prefetch, open_cursor
from dvkernels.data.random_map import RandomMap
from dvkernels.data.repeat import Repeat
from dvkernels.data.shuffle import Shuffle, WindowedShuffle
from dvkernels.data.subset import Shard, Skip, Take
from dvkernels.data.zip import Zip
from dvkernels.errors import DatasetError

__all__ = ["Dataset"]


class Dataset(DatasetConstructors):
    """Elements in an order that depends on the seeds and the epoch alone.

    Made by the ``from_...`` methods and :meth:`range`; every transform returns a new dataset and
    leaves this one unchanged. An element is a pytree of arrays and numbers: any container that
    ``optree`` knows (tuples, lists, dicts, named tuples, registered dataclasses).

    Each iteration starts anew and yields the elements of epoch 0, or of the epoch set by
    :meth:`with_epoch`. An error in user code (a source, a function given to :meth:`map`,
    :meth:`random_map` or :meth:`filter`) is re-raised as it is, with a note that names index,
    source and transform; the next ``next()`` tries the same element again.

    Notes
    -----
    :meth:`from_arrays`, :meth:`from_sequence`, :meth:`range` and, if asked to, :meth:`from_files`
    have random access, and so have all transforms of them except :meth:`filter`: element n is
    computed from n, so an iterator starts anywhere at once. An iterator over a sequential dataset
    is resumed by replaying the elements before its position; over :meth:`from_source` it is
    resumed through the state of the source, and over :meth:`from_live` it cannot be resumed.

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

    __slots__ = ("__weakref__", "_epoch", "_node")

    def __init__(self, node: Node, epoch: int | None = None) -> None:
        if not isinstance(node, Node):
            raise DatasetError(
                f"Dataset: expected a node; got a {type(node).__name__}; make datasets with "
                "Dataset.from_arrays, from_sequence, from_iterable or range"
            )
        self._node = node
        self._epoch = epoch

    def _then(self, node: Node) -> Dataset:
        return Dataset(node, self._epoch)

    @property
    def node(self) -> Node:
        """The last node of the pipeline, which computes the elements."""
        return self._node

    @property
    def epoch(self) -> int | None:
        """The epoch set by :meth:`with_epoch`, else None."""
        return self._epoch

    @property
    def length(self) -> Length:
        """The number of elements: ``math.inf`` if endless, None if unknown before the end."""
        return self._node.length

    @property
    def files(self) -> tuple[str, ...]:
        """The paths given to :meth:`from_files`, empty for other sources."""
        node: Node | None = self._node
        while node is not None and not isinstance(node, FileList):
            node = node.source
        return () if node is None else node.files

    def zip(self, *others: Dataset) -> Dataset:
        """Make tuples of the elements of this dataset and of others; as long as the shortest.

        ``Dataset.zip(a, b, c)`` is ``a.zip(b, c)``. It has random access if all of them have it.

        Examples
        --------
        >>> letters = Dataset.from_sequence("abc")
        >>> [(letter, int(number)) for letter, number in letters.zip(Dataset.range(2))]
        [('a', 0), ('b', 1)]
        """
        for index, other in enumerate(others):
            if not isinstance(other, Dataset):
                raise unexpected(
                    "zip",
                    "datasets",
                    other,
                    "make it a dataset with from_arrays or from_sequence",
                    f", as argument {index}",
                )
            if other.epoch != self._epoch:
                raise DatasetError(
                    f"zip: expected datasets that begin with one epoch; got {self._epoch} for this "
                    f"one and {other.epoch} for argument {index}; call with_epoch() after zip()"
                )
        return self._then(Zip([self._node, *(other.node for other in others)]))

    def with_epoch(self, epoch: int) -> Dataset:
        """Set the epoch to begin with, instead of epoch 0; the order is that of this epoch.

        For loops that distribute or iterate the dataset anew for each epoch.

        Examples
        --------
        >>> shuffled = Dataset.range(6).shuffle(seed=1)
        >>> [[int(element) for element in shuffled.with_epoch(epoch)] for epoch in range(2)]
        [[3, 4, 0, 5, 2, 1], [5, 0, 2, 1, 3, 4]]
        """
        return Dataset(self._node, check_count("with_epoch", "epoch", epoch, 0))

    def shuffle(
        self, *, seed: int, window: int | None = None, reshuffle_each_epoch: bool = True
    ) -> Dataset:
        """Shuffle the elements into an order that is a function of the seed and the epoch.

        Parameters
        ----------
        seed : int
            Any non-negative integer of up to 1024 bits.
        window : int, optional
            Shuffle within windows of this many elements, which are kept in memory if there is no
            random access; the order depends on the window too. Needed for sequential and
            endless datasets.
        reshuffle_each_epoch : bool
            False to use the order of epoch 0 in every epoch.

        Raises
        ------
        DatasetError
            Without ``window``, the dataset has no random access, or is endless.

        Notes
        -----
        Without ``window`` the whole dataset is shuffled in O(1) memory, by a keyed permutation of
        the indices. With it no element moves further than the window, so shuffle the files as
        well; the windows begin elsewhere in each epoch. An iterator is resumed at the start of
        its window.

        Examples
        --------
        >>> shuffled = Dataset.range(6).shuffle(seed=1)
        >>> sorted(int(element) for element in shuffled)
        [0, 1, 2, 3, 4, 5]
        """
        if window is None:
            return self._then(Shuffle(self._node, seed, reshuffle_each_epoch))
        return self._then(WindowedShuffle(self._node, seed, window, reshuffle_each_epoch))

    def map(
        self, fn: Callable[[Element], Element], *, num_workers: int = 0, workers: str = "threads"
    ) -> Dataset:
        """Replace each element by ``fn(element)``.

        Parameters
        ----------
        fn : callable
            Its qualified name is part of the state of an iterator, so resuming with a function of
            another name is refused.
        num_workers : int
            How many threads or processes share the elements of a batch; 0 calls ``fn`` in the
            thread that requests the batch. The order is kept.
        workers : {"threads", "processes"}
            Use threads where ``fn`` releases the interpreter lock (NumPy on large arrays, Numba
            with ``nogil``, reading files), processes where it does not. Processes are spawned, so
            ``fn`` must be importable; elements and results are pickled and sent between the
            processes. They are started by the first iterator and end with the last.

        Raises
        ------
        DatasetError
            ``fn`` is not callable, or cannot be sent to a process.

        Examples
        --------
        >>> list(Dataset.from_sequence([1, 2]).map(lambda x: 10 * x))
        [10, 20]
        """
        return self._then(Map(self._node, fn, num_workers, workers))

    def random_map(
        self,
        fn: Callable[[Element, np.random.Generator], Element],
        *,
        seed: int,
        num_workers: int = 0,
        workers: str = "threads",
    ) -> Dataset:
        """Replace each element by ``fn(element, rng)``, for augmentations and other random changes.

        The draws of ``rng``, a NumPy Generator, depend on the seed, the epoch, the index of the
        element among those that come here, and the number of random maps before this one. So they
        are the same on any number of replicas, workers and threads, with any prefetching, and after
        a resume. ``repeat`` behind it draws anew in each repetition; shards of one dataset draw as
        the whole does. The other arguments are those of :meth:`map` and :meth:`shuffle`.

        Examples
        --------
        >>> noisy = Dataset.range(3).random_map(lambda x, rng: x + 10 * rng.integers(10), seed=1)
        >>> [[int(element) for element in noisy.with_epoch(epoch)] for epoch in range(2)]
        [[90, 51, 2], [90, 61, 52]]
        """
        return self._then(RandomMap(self._node, fn, seed, num_workers, workers))

    def prefetch(self, n: int) -> Dataset:
        """Have a thread of each iterator keep up to ``n`` elements ready.

        The elements, their order and every state stay the same: elements that are ready but not
        delivered do not count. Prefetching pays off where computing an element releases the
        interpreter lock, or waits.

        Examples
        --------
        >>> [batch.tolist() for batch in Dataset.range(4).batch(2).prefetch(1)]
        [[0, 1], [2, 3]]
        """
        return self._then(Prefetch(self._node, n))

    def filter(self, predicate: Callable[[Element], object]) -> Dataset:
        """Keep the elements for which ``predicate(element)`` is true; sequential from here on.

        Examples
        --------
        >>> list(Dataset.from_sequence([1, 2, 3]).filter(lambda x: x != 2))
        [1, 3]
        """
        return self._then(Filter(self._node, predicate))

    def batch(self, size: int, *, drop_remainder: bool = False) -> Dataset:
        """Stack runs of ``size`` elements along a new leading axis.

        ``drop_remainder=True`` drops the last run if it is shorter. In a dataset that is
        distributed, ``size`` is the global batch size, which is split over the replicas.

        Examples
        --------
        >>> [batch.tolist() for batch in Dataset.range(5).batch(2)]
        [[0, 1], [2, 3], [4]]
        """
        return self._then(Batch(self._node, size, drop_remainder))

    def repeat(self, count: int | None = None) -> Dataset:
        """Repeat the elements ``count`` times, endlessly for None.

        Each repetition counts as an epoch of the transforms before it, so
        ``shuffle(...).repeat(...)`` reshuffles: repetition r of epoch e is epoch
        ``e * count + r`` there, and ``e * 2**32 + r`` if the repetition is endless. An empty
        dataset stays empty.

        Examples
        --------
        >>> [int(element) for element in Dataset.range(2).repeat(2)]
        [0, 1, 0, 1]
        """
        return self._then(Repeat(self._node, count))

    def take(self, n: int) -> Dataset:
        """Keep the first ``n`` elements, all if there are fewer.

        Examples
        --------
        >>> [int(element) for element in Dataset.range(9).take(2)]
        [0, 1]
        """
        return self._then(Take(self._node, n))

    def skip(self, n: int) -> Dataset:
        """Leave out the first ``n`` elements, all if there are fewer.

        Examples
        --------
        >>> [int(element) for element in Dataset.range(4).skip(2)]
        [2, 3]
        """
        return self._then(Skip(self._node, n))

    def shard(self, num: int, index: int) -> Dataset:
        """Keep every ``num``-th element, from element ``index`` on.

        The shards 0 to ``num - 1`` together are the dataset, without overlap.

        Examples
        --------
        >>> [int(element) for element in Dataset.range(7).shard(3, 1)]
        [1, 4]
        """
        return self._then(Shard(self._node, num, index))

    def __iter__(self) -> Iterator[Element]:
        return open_cursor(self._node, EpochPosition(self._epoch or 0, 0))

    def __len__(self) -> int:
        return known_length(self._node.length)

    def __bool__(self) -> bool:
        # Without this, ``if dataset`` would call __len__, which may raise.
        return True

    def __repr__(self) -> str:
        chosen = "" if self._epoch is None else f".with_epoch({self._epoch})"
        return f"Dataset.{self._node!r}{chosen}"

    _repr_html_ = html_table.of_attributes(pipeline="_node.pipeline", epoch="_epoch")


def known_length(length: Length) -> int:
    """Return a known, finite length; raise the ``TypeError`` of ``len()`` otherwise."""
    if length is None:
        raise TypeError("the length of this dataset is not known before its end is reached")
    if length == math.inf:
        raise TypeError("this dataset is endless; take(n) makes it end")
    return int(length)
