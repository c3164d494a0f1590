"""Constructors of datasets: from arrays, sequences, iterables, files, sources and queues."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Iterable
from typing import Any, Self

from dvkernels.data.checks import check_flag
from dvkernels.data.file_source import FromFiles, FromIndexedFiles
from dvkernels.data.node import Node
from dvkernels.data.queue_source import FromQueue
from dvkernels.data.sources import FromArrays, FromIterable, FromSequence, Range, SupportsIndexing
from dvkernels.data.stateful_source import FromSource, FromStatefulIterable, Source

__all__ = ["DatasetConstructors"]


class DatasetConstructors(abc.ABC):
    """Constructors of :class:`dvkernels.data.dataset.Dataset`, which inherits them."""

    __slots__ = ()

    @abc.abstractmethod
    def __init__(self, node: Node) -> None: ...

    @classmethod
    def from_arrays(cls, nest: Any) -> Self:
        """Make a dataset of the rows of one or more arrays of the same leading length.

        The arrays are not copied: batches of consecutive rows are read-only views of them.

        Parameters
        ----------
        nest : array or pytree of arrays, each of shape (n, ...), any dtype
            Arrays, and objects that ``numpy.asarray`` reads without a loop (PyTorch CPU tensors).

        Raises
        ------
        DatasetError
            Leading lengths differ, or a leaf is a scalar. The message names the leaves.

        Examples
        --------
        >>> from dvkernels.data.dataset import Dataset
        >>> import numpy as np
        >>> list(Dataset.from_arrays({"x": np.array([1.5, 2.5])}))
        [{'x': np.float64(1.5)}, {'x': np.float64(2.5)}]
        """
        return cls(FromArrays(nest))

    @classmethod
    def range(cls, n: int) -> Self:
        """Make a dataset of the integers 0 to n - 1 (int64).

        Examples
        --------
        >>> from dvkernels.data.dataset import Dataset
        >>> [int(element) for element in Dataset.range(3)]
        [0, 1, 2]
        """
        return cls(Range(n))

    @classmethod
    def from_sequence(cls, sequence: SupportsIndexing) -> Self:
        """Make a dataset of ``sequence[0]`` to ``sequence[len(sequence) - 1]``.

        The length is read once, here; elements are read on demand, one at a time and in any order.

        Examples
        --------
        >>> from dvkernels.data.dataset import Dataset
        >>> list(Dataset.from_sequence("abc"))
        ['a', 'b', 'c']
        """
        return cls(FromSequence(sequence))

    @classmethod
    def from_iterable(
        cls, factory: Callable[..., Iterable[Any]], *, stateful: bool = False, epoch: bool = False
    ) -> Self:
        """Make a sequential dataset of the elements that ``iter(factory())`` yields.

        Parameters
        ----------
        factory : callable
            Called at the start of each epoch, and again to resume or after an error; returns an
            iterable that yields the same elements each time.
        epoch : bool
            True to call ``factory(epoch)``: the iterable then yields the same elements each time
            for the same epoch.
        stateful : bool
            True if the iterable, or its iterator, has ``state_dict()`` and
            ``load_state_dict(state)``, as PyTorch's ``StatefulDataLoader`` has: it is resumed
            through them, not by replay. The state, which must be JSON-serializable, is read after
            each element.

        Examples
        --------
        >>> from dvkernels.data.dataset import Dataset
        >>> def lines():
        ...     yield from ("one", "two")
        >>> list(Dataset.from_iterable(lines))
        ['one', 'two']
        """
        check_flag("from_iterable", "stateful", stateful)
        return cls((FromStatefulIterable if stateful else FromIterable)(factory, epoch))

    @classmethod
    def from_files(
        cls,
        paths: Iterable[str | os.PathLike[str]],
        reader: Callable[[str], Any],
        *,
        random_access: bool = False,
    ) -> Self:
        """Make a dataset of the elements that ``reader(path)`` yields of each file, in order.

        Parameters
        ----------
        paths : iterable of str or path
            Files or folders, all of which must exist now. Sort the listing of a folder: its order
            differs between machines.
        reader : callable
            ``reader(path)`` is a generator function, or returns an iterable. The iterable and its
            iterator are closed, where they have ``close()``, at the end or when the dataset's
            iterator is closed. The reader must yield the same elements each time.
        random_access : bool
            True if ``reader(path)`` returns an object with ``__len__`` and ``__getitem__``
            (``numpy.load(path, mmap_mode="r")``). Each file is opened once here for its length,
            and later on demand; eight are kept open.

        Raises
        ------
        DatasetError
            A path does not exist. The message names it.

        Examples
        --------
        >>> from dvkernels.data.dataset import Dataset
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> for name in ("a", "b"):
        ...     _ = pathlib.Path(folder.name, name).write_text(f"{name}0 {name}1")
        >>> def words(path):
        ...     with open(path, encoding="utf-8") as file:
        ...         yield from file.read().split()
        >>> dataset = Dataset.from_files(sorted(pathlib.Path(folder.name).iterdir()), words)
        >>> list(dataset), len(dataset.files)
        (['a0', 'a1', 'b0', 'b1'], 2)
        >>> folder.cleanup()
        """
        check_flag("from_files", "random_access", random_access)
        return cls((FromIndexedFiles if random_access else FromFiles)(paths, reader))

    @classmethod
    def from_source(cls, source: Source) -> Self:
        """Make a sequential dataset of a source that saves and restores its own state.

        Parameters
        ----------
        source : Source
            Its ``open(epoch, state)`` returns a reader with ``__next__()`` and ``state()``. The
            state becomes part of the iterator's state, so nothing is replayed, except the elements
            that a transform needs (a window of :meth:`shuffle`). See
            :class:`~dvkernels.data.stateful_source.Source`.

        Examples
        --------
        >>> from dvkernels.data.dataset import Dataset
        >>> class Letters:
        ...     def open(self, epoch, state):
        ...         return LettersReader(0 if state is None else state["next"])
        >>> class LettersReader:
        ...     def __init__(self, position):
        ...         self.position = position
        ...     def __next__(self):
        ...         if self.position == 3:
        ...             raise StopIteration
        ...         self.position += 1
        ...         return "abc"[self.position - 1]
        ...     def state(self):
        ...         return {"next": self.position}
        >>> list(Dataset.from_source(Letters()))
        ['a', 'b', 'c']
        """
        return cls(FromSource(source))

    @classmethod
    def from_live(
        cls,
        source: Any,
        *,
        batch_size: int | None = None,
        max_wait_seconds: float | None = None,
        end: object = None,
    ) -> Self:
        """Make a dataset of the elements of a queue, or of batches of them, as they arrive.

        Parameters
        ----------
        source : queue or callable
            A ``queue.Queue`` or another object with ``get(timeout=...)``, or such a function: it
            returns the next element, or raises ``queue.Empty`` or ``TimeoutError`` if there is
            none after ``timeout`` seconds.
        batch_size : int, optional
            Deliver batches of that many elements, stacked as by :meth:`batch`.
        max_wait_seconds : float, optional
            Deliver an incomplete batch this long after its first element was taken. Without it
            a batch waits until it is full or the stream ends.
        end : object
            The element that ends the stream. ``StopIteration`` raised by a function ends it too,
            as does a queue that has been shut down (Python 3.13).

        Notes
        -----
        There is one stream: each element is delivered once, an epoch continues where the last one
        stopped, and one iterator reads at a time. If a transform raises, its batch is tried
        again. An iterator cannot be resumed: saving or loading its state raises
        ``DatasetError``.

        Examples
        --------
        >>> from dvkernels.data.dataset import Dataset
        >>> import queue
        >>> arrived = queue.SimpleQueue()
        >>> for value in (1, 2, 3, None):
        ...     arrived.put(value)
        >>> list(Dataset.from_live(arrived, batch_size=2, max_wait_seconds=0.5))
        [array([1, 2]), array([3])]
        """
        return cls(FromQueue(source, batch_size, max_wait_seconds, end))
