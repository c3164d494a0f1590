"""Per-worker datasets: each worker has a dataset, and iterators over it, of its own."""

from __future__ import annotations

import itertools
import os
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


# In a worker process: its iterators, by their number on the coordinator.
_own: dict[int, Iterator[Any]] = {}
_numbers = itertools.count()


def own_iterator(number: int, dataset: PerWorkerDataset) -> Iterator[Any]:
    """Return the iterator of this worker process for that of all workers."""
    found = _own.get(number)
    if found is None:
        found = _own[number] = _begun(dataset, f"in process {os.getpid()}")
    return found


def _begun(dataset: PerWorkerDataset, where: str) -> Iterator[Any]:
    try:
        return iter(dataset.make())
    except BaseException as error:
        user_errors.annotate(error, f"raised for the dataset {where}")
        raise


@final
class PerWorkerIterator:
    """Iterators over a per-worker dataset: in a call, an argument is that of its worker."""

    __slots__ = ("__weakref__", "_dataset", "_number")

    def __init__(self, dataset: PerWorkerDataset) -> None:
        self._dataset = dataset
        self._number = next(_numbers)

    def __iter__(self) -> PerWorkerIterator:
        return self

    def __next__(self) -> NoReturn:
        raise ContextError(
            "next was called on the iterators of all workers; pass them to a call, "
            "schedule(fn, args=(iterator,)), in which they are the iterator of its worker"
        )

    def of_worker(self, worker: int) -> Iterator[Any]:
        """Return a new iterator, for one worker."""
        return _begun(self._dataset, f"of worker {worker}")

    def __reduce__(self) -> tuple[Any, ...]:
        return own_iterator, (self._number, self._dataset)
