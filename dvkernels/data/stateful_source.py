"""Stateful sources: readers that save and restore their own state, so need no replay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from dvkernels.data.array_nest import Element
from dvkernels.data.checks import check_callable, check_flag, unexpected
from dvkernels.data.node import Node, add_note, callable_name
from dvkernels.errors import DatasetError
from dvkernels.user_errors import brief, describe

__all__ = ["FromSource", "FromStatefulIterable", "Reader", "Source"]


class Reader(Protocol):
    """Reader of one epoch of a :class:`Source`, for one iterator.

    A reader may also have ``close()``, which is called when it is no longer needed.
    """

    def __next__(self) -> Any:
        """Return the next element; ``StopIteration`` at the end of the epoch."""
        ...

    def state(self) -> Any:
        """Return the state from which ``open`` continues behind the latest element.

        The state is requested and copied after each element, so it should be small: a few dozen
        bytes. It may consist of numbers, text, bytes, NumPy arrays, PyTorch tensors, and lists,
        tuples and dicts of these.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """Stateful source for :meth:`Dataset.from_source`: a table, an archive, a database.

    The protocol has three methods: ``open`` here, ``__next__`` and ``state`` of the
    :class:`Reader` that it returns. All iterators share the source, which therefore has no
    position; each reader has one.

    Examples
    --------
    >>> from dvkernels.data.dataset import Dataset
    >>> class Countdown:
    ...     def open(self, epoch, state):
    ...         return CountdownReader(3 if state is None else state)
    >>> class CountdownReader:
    ...     def __init__(self, left):
    ...         self.left = left
    ...     def __next__(self):
    ...         if self.left == 0:
    ...             raise StopIteration
    ...         self.left -= 1
    ...         return self.left
    ...     def state(self):
    ...         return self.left
    >>> list(Dataset.from_source(Countdown()))
    [2, 1, 0]
    """

    def open(self, epoch: int, state: Any) -> Reader:
        """Return a new reader, at the start of the epoch if ``state`` is None.

        Otherwise ``state`` is a copy of a result of ``Reader.state``, and the new reader must yield
        the elements that followed there.
        """
        ...


class FromSource(Node):
    """Sequential node over a :class:`Source`, resumed through the state of its reader."""

    random_access = False
    length = None
    is_replayable = False
    has_resume_points = True
    initial_resume_value = None  # A resume value is a private copy of the reader's state.

    def __init__(self, source: Source) -> None:
        if isinstance(source, type) or not callable(getattr(source, "open", None)):
            raise unexpected(
                "from_source",
                "an object with open(epoch, state), which returns a reader with __next__() and "
                "state()",
                source,
                "use from_iterable(factory) for what has no state",
            )
        self._source = source

    def describe(self) -> str:
        return f"from_source({type(self._source).__qualname__})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        index, state = self.resume(epoch, start)
        name, verb = type(self._source).__name__, "open"
        reader: Any = None
        try:
            reader = self._source.open(epoch, copy.deepcopy(state))
            self._check_reader(reader)
            while True:
                verb = "__next__"
                try:
                    element = next(reader)
                except StopIteration:
                    return
                index += 1
                if self.resume_points is not None:
                    verb = "state"
                    self.resume_points.add(epoch, index, self._copy_state(reader.state()))
                if index > start:
                    yield element
        except DatasetError:
            raise
        except Exception as error:
            add_note(error, f"{name}.{verb}", self, index, epoch)
            raise
        finally:
            if callable(close := getattr(reader, "close", None)):
                close()

    def restore(self, memory: Iterator[Any]) -> None:
        assert self.resume_points is not None
        entry = next(memory, None)
        if isinstance(entry, list) and len(entry) == 3 and entry[1] == 0:
            entry = [*entry[:2], None]
        self.resume_points.restore(entry)

    def _check_reader(self, reader: object) -> None:
        lacking = [name for name in ("__next__", "state") if not hasattr(reader, name)]
        if lacking:
            raise DatasetError(
                "from_source: expected open() to return a reader with __next__() and state(); got "
                f"a {type(reader).__name__} without {' and '.join(lacking)}; add what is missing"
            )

    def _copy_state(self, state: object) -> object:
        try:
            return copy.deepcopy(state)
        except Exception as error:
            raise DatasetError(
                f"from_source: expected a state that can be copied; got {brief(state)} "
                f"({describe(error)}); return numbers, text, arrays, and lists and "
                "dicts of them"
            ) from error


class FromStatefulIterable(FromSource):
    """Sequential node over the iterables of ``factory``, resumed through their ``state_dict``."""

    def __init__(self, factory: Callable[..., Any], takes_epoch: bool) -> None:
        check_flag("from_iterable", "epoch", takes_epoch)
        check_callable("from_iterable", factory, "pass what makes a new iterable on each call")
        super().__init__(_StatefulIterableSource(factory, takes_epoch))
        self._options = "stateful=True, epoch=True" if takes_epoch else "stateful=True"
        self._name = callable_name(factory)

    def describe(self) -> str:
        return f"from_iterable({self._name}, {self._options})"


class _StatefulIterableSource:
    """Source over iterables that have, or whose iterators have, ``state_dict``."""

    def __init__(self, factory: Callable[..., Any], takes_epoch: bool) -> None:
        self._factory = factory
        self._takes_epoch = takes_epoch

    def open(self, epoch: int, state: Any) -> Reader:
        iterable = self._factory(epoch) if self._takes_epoch else self._factory()
        holder = iterable if _has_state_dict(iterable) else iter(iterable)
        if not _has_state_dict(holder):
            raise DatasetError(
                f"from_iterable: expected stateful=True to come with an iterable, or an iterator, "
                f"that has state_dict() and load_state_dict(state); got a "
                f"{type(iterable).__name__} and a {type(holder).__name__}; leave stateful out "
                f"to have it resumed by replay"
            )
        if state is not None:  # A loader loads its state before it makes an iterator.
            holder.load_state_dict(state)
        return _StatefulReader(iter(iterable) if holder is iterable else holder, holder)


class _StatefulReader:
    """Reader of an iterator whose state is in ``holder``: the iterable or the iterator itself."""

    def __init__(self, iterator: Iterator[Any], holder: Any) -> None:
        self._iterator = iterator
        self._holder = holder

    def __next__(self) -> Any:
        return next(self._iterator)

    def state(self) -> Any:
        return self._holder.state_dict()

    def close(self) -> None:
        if callable(close := getattr(self._iterator, "close", None)):
            close()


def _has_state_dict(value: object) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))
