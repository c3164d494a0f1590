"""Per-worker datasets: each worker has a dataset, and iterators over it, of its own."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, final

from dvkernels import user_errors
from dvkernels.errors import ContextError

__all__ = ["PerWorkerDataset", "PerWorkerIterator"]


@final
class PerWorkerDataset:
    """Dataset of which each worker has one of its own, made by a function: see ``iter()``."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __iter__(self) -> PerWorkerIterator:
        """Return the iterators of all workers, as one argument of ``schedule``."""
        return PerWorkerIterator(self)


_numbers = itertools.count()
_of_all: weakref.WeakValueDictionary[int, PerWorkerIterator] = weakref.WeakValueDictionary()
# In a worker process: its iterators, by their number on the coordinator.
_own: dict[int, Iterator[Any]] = {}


class IteratorHasNotBegun(Exception):
    """A worker process has no iterator of a number yet: the coordinator sends it the dataset."""


def own_iterator(number: int) -> Iterator[Any]:
    """Return the iterator of this worker process for that of all workers."""
    try:
        return _own[number]
    except KeyError:
        raise IteratorHasNotBegun(number) from None


def begin_own(number: int, dataset: PerWorkerDataset) -> None:
    """Begin the iterator of this worker process for that of all workers."""
    _own[number] = _begun(dataset, f"in process {os.getpid()}")


def end_own(numbers: list[int]) -> None:
    """Drop iterators of this worker process."""
    for number in numbers:
        _own.pop(number, None)


def has_ended(number: int) -> bool:
    """Return whether nobody on the coordinator has the iterators of all workers any more."""
    return number not in _of_all


def to_begin(number: int) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return the call that begins an iterator in a worker process: function and arguments."""
    found = _of_all.get(number)
    if found is None:
        raise ContextError(
            "the iterators over a per-worker dataset are gone: nobody has a reference to them any "
            "more; keep one while calls use them"
        )
    return begin_own, (number, found.dataset)


def _begun(dataset: PerWorkerDataset, where: str) -> Iterator[Any]:
    try:
        return iter(dataset.make())
    except BaseException as error:
        user_errors.annotate(error, f"raised for the dataset {where}")
        raise


@final
class PerWorkerIterator:
    """Iterators over a per-worker dataset: in a call, an argument is that of its worker."""

    __slots__ = ("__weakref__", "_number", "dataset")

    def __init__(self, dataset: PerWorkerDataset) -> None:
        self.dataset = dataset
        self._number = next(_numbers)
        _of_all[self._number] = self

    def __iter__(self) -> PerWorkerIterator:
        return self

    def __next__(self) -> NoReturn:
        raise ContextError(
            "next was called on the iterators of all workers; pass them to a call, "
            "schedule(fn, args=(iterator,)), in which they are the iterator of its worker"
        )

    def of_worker(self, worker: int) -> Iterator[Any]:
        """Return a new iterator, for one worker."""
        return _begun(self.dataset, f"of worker {worker}")

    def __reduce__(self) -> tuple[Any, ...]:
        return own_iterator, (self._number,)
