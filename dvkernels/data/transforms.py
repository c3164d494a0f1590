"""Transforms of datasets, except shuffle and zip: one node class each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dvkernels.data.array_nest import concatenate, owned_copy, slice_rows, take
from dvkernels.data.checks import LARGEST_INDEX, check_count, check_flag, check_function_of_one
from dvkernels.data.error_policy import skipping
from dvkernels.data.map_workers import KINDS, MapWorkers, check_sendable
from dvkernels.data.node import (
    Indices,
    Length,
    Node,
    RowSelector,
    add_note,
    callable_name,
)
from dvkernels.data.outcome import Outcome, outcome_of
from dvkernels.data.stacking import BatchBuilder
from dvkernels.errors import DatasetError
from dvkernels.user_errors import brief

__all__ = [
    "Batch",
    "Filter",
    "Map",
    "Prefetch",
    "Repeat",
    "Shard",
    "Skip",
    "Take",
    "prefetch_depth",
]

# Epochs of the source per epoch of an endless repeat, so that no two repetitions share one.
_ENDLESS_STRIDE = 2**32


class _Transform(Node):
    """Base class of the transforms: a node with one source."""

    source: Node

    def __init__(self, source: Node, length: Length) -> None:
        self.source = source
        self.length = length
        self.random_access = source.random_access

    def _fits_int64(self, indices: Indices, factor: int, offset: int) -> bool:
        """Return whether ``indices * factor + offset``, of shape (n,), fits int64.

        It may not for endless and very long sources, which need Python's integers.
        """
        length = self.source.length
        if length is not None and length <= LARGEST_INDEX:
            return True
        return int(indices.max()) * factor + offset <= LARGEST_INDEX

    def _value_unless_skipped(self, outcome: Outcome, index: int, epoch: int) -> tuple[Any, ...]:
        """Return (value,) of an outcome, or () if its error is skipped; else raise the error."""
        error = outcome.error
        if error is None:
            return (outcome.value,)
        try:
            add_note(error, self.describe(), self.source, index, epoch)
        except RuntimeError as other:
            error = other
        skips = skipping.get()
        if skips is None:
            raise error
        skips.note(error, self.describe())
        return ()


class _SamePositions(_Transform):
    """Base class of the transforms whose element n is element n of the source."""

    def element(self, index: int, epoch: int) -> Any:
        return self.source.element(index, epoch)

    def gather(self, indices: Indices, epoch: int) -> Any:
        return self.source.gather(indices, epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Any:
        return self.source.batch(start, stop, epoch)

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index, epoch)


class Map(_Transform):
    """Map: ``fn(element)`` for every element."""

    has_resume_points = True
    initial_resume_value = 0  # The number of elements of the source mapped so far, or skipped.
    owns_elements = False

    def __init__(
        self,
        source: Node,
        fn: Callable[[Any], Any],
        num_workers: int = 0,
        workers: str = "threads",
    ) -> None:
        check_function_of_one("map", fn)
        count = check_count("map", "num_workers", num_workers, 0)
        if workers not in KINDS:
            raise DatasetError(
                f"map: expected workers to be one of {', '.join(KINDS)}; got {brief(workers)}"
            )
        if count and workers == "processes":
            check_sendable(fn)
        super().__init__(source, source.length)
        self._fn = fn
        self._workers = MapWorkers(fn, count, workers) if count else None
        self.has_workers = self._workers is not None

    def hold_workers(self) -> object:
        return None if self._workers is None else self._workers.hold()

    def describe(self) -> str:
        return f"map({callable_name(self._fn)})"

    def element(self, index: int, epoch: int) -> Any:
        return self._apply(self.source.element(index, epoch), index, epoch)

    def elements(self, indices: Sequence[int], epoch: int) -> Iterator[Any]:
        if self._workers is None or len(indices) < 2:
            return super().elements(indices, epoch)
        given = [
            (index, self._unshared(element))
            for index, element in self.source.attempts(indices, epoch)
        ]
        outcomes = self._workers.map([element for _, element in given])
        kept = (
            self._value_unless_skipped(outcome, index, epoch)
            for (index, _), outcome in zip(given, outcomes, strict=True)
        )
        return itertools.chain.from_iterable(kept)

    def _unshared(self, element: Any) -> Any:
        """Return the element, copied if user code could change it while workers use it."""
        return element if self.source.owns_elements else owned_copy(element)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        if self.random_access:
            yield from super().iterate(epoch, start)
            return
        # Skipped elements do not count as positions, so the elements before are mapped again.
        num_yielded, begin = (start, start) if skipping.get() is None else (0, 0)
        if self.resume_points is not None:
            num_yielded, begin = self.resume_points.resume(epoch, start)
        elements = self.source.iterate(epoch, begin)
        if self._workers is not None:
            outcomes: Iterator[Outcome] = self._workers.map_lazily(map(self._unshared, elements))
        else:
            outcomes = (outcome_of(self._fn, element) for element in elements)
        for index, outcome in enumerate(outcomes, begin):
            for value in self._value_unless_skipped(outcome, index, epoch):
                num_yielded += 1
                if self.resume_points is not None:
                    self.resume_points.add(epoch, num_yielded, index + 1)
                if num_yielded > start:
                    yield value

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        return epoch, position if self.resume_points is None else self.resume_points.find(
            epoch, position
        )[1]

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index, epoch)

    def _apply(self, element: Any, index: int, epoch: int) -> Any:
        try:
            return self._fn(element)
        except Exception as error:
            add_note(error, self.describe(), self.source, index, epoch)
            raise


class Prefetch(_SamePositions):
    """Prefetch: the same elements, of which iterators keep ``depth`` ready."""

    def __init__(self, source: Node, depth: int) -> None:
        self.depth = check_count("prefetch", "n", depth, 0)
        super().__init__(source, source.length)

    def describe(self) -> str:
        return f"prefetch({self.depth})"

    @property
    def pipeline(self) -> tuple[str, ...]:
        return self.source.pipeline  # prefetching changes no element and no position

    def elements(self, indices: Sequence[int], epoch: int) -> Iterator[Any]:
        return self.source.elements(indices, epoch)

    def select_rows(self, index: int, epoch: int, select: RowSelector) -> Any:
        return self.source.select_rows(index, epoch, select)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        return self.source.iterate(epoch, start)


def prefetch_depth(node: Node, wanted: int | None = None) -> int:
    """Return how many elements iterators prefetch: ``wanted``, or the depth set by the pipeline.

    It is 0 for a live source, whose prefetched elements would be lost when they are dropped.
    """
    if node.why_not_resumable is not None:
        return 0
    if wanted is not None:
        return wanted
    return max((link.depth for link in node.links() if isinstance(link, Prefetch)), default=0)


class Filter(_Transform):
    """Filter: the elements for which ``predicate(element)`` is true; sequential."""

    has_resume_points = True
    initial_resume_value = 0  # The number of elements of the source tested so far.

    def __init__(self, source: Node, predicate: Callable[[Any], object]) -> None:
        check_function_of_one("filter", predicate)
        super().__init__(source, 0 if source.length == 0 else None)
        self.random_access = False
        self._predicate = predicate

    def describe(self) -> str:
        return f"filter({callable_name(self._predicate)})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        position, begin = (
            (0, 0) if self.resume_points is None else self.resume_points.resume(epoch, start)
        )
        for source_position, element in self.source.enumerate_from(epoch, begin):
            if not self._passes(element, source_position - 1, epoch):
                continue
            position += 1
            if self.resume_points is not None:
                self.resume_points.add(epoch, position, source_position)
            if position > start:
                yield element

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        assert self.resume_points is not None
        return epoch, self.resume_points.find(epoch, position)[1]

    def _passes(self, element: Any, index: int, epoch: int) -> bool:
        outcome = outcome_of(lambda argument: bool(self._predicate(argument)), element)
        return any(self._value_unless_skipped(outcome, index, epoch))


class Batch(_Transform):
    """Batch: runs of ``size`` elements, stacked along a new leading axis."""

    def __init__(self, source: Node, size: int, drop_remainder: bool) -> None:
        self.size = check_count("batch", "size", size, 1)
        check_flag("batch", "drop_remainder", drop_remainder)
        self.drops_remainder = drop_remainder
        length = source.length
        if isinstance(length, int):
            length = length // self.size if drop_remainder else -(-length // self.size)
        super().__init__(source, length)

    owns_elements = True  # Stacking copies.

    def describe(self) -> str:
        return f"batch({self.size}{', drop_remainder=True' if self.drops_remainder else ''})"

    def element(self, index: int, epoch: int) -> Any:
        return self.source.batch(*self._run(index), epoch)

    def select_rows(self, index: int, epoch: int, select: RowSelector) -> Any:
        if skipping.get() is not None:  # the length of the batch is known only once it is computed
            return super().select_rows(index, epoch, select)
        start, stop = self._run(index)
        first, last = select(stop - start)
        if first == last:
            return slice_rows(self.source.batch(start, start + 1, epoch), 0, 0)
        return self.source.batch(start + first, start + last, epoch)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        if self.random_access:
            yield from super().iterate(epoch, start)
            return
        elements = self.source.iterate(*self.upstream(epoch, start))
        while True:
            batch = BatchBuilder(self.size)
            for element in itertools.islice(elements, self.size):
                batch.add(element)
            if not batch.count or (batch.count < self.size and self.drops_remainder):
                return
            yield batch.build()

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        return epoch, position * self.size

    def _run(self, index: int) -> tuple[int, int]:
        start = index * self.size
        stop = start + self.size
        length = self.source.length
        if length is not None and stop > length:
            stop = int(length)
        return start, stop


class Repeat(_Transform):
    """Repeat: ``count`` passes over the source, endlessly many for None.

    Repetition r of epoch e is epoch ``e * count + r`` of the source, so that a shuffle upstream
    reshuffles for each repetition; it is epoch ``e * 2**32 + r`` if the repeat is endless.
    """

    has_resume_points = True
    initial_resume_value = (0, 0)  # The repetition, and the position in it.

    def __init__(self, source: Node, count: int | None) -> None:
        if count is not None:
            count = check_count(
                "repeat", "count", count, 0, "leave it out, or pass None, to repeat without end"
            )
        self.count = count
        self._stride = _ENDLESS_STRIDE if count is None else count
        length = source.length
        if length == 0 or count == 0:
            length = 0
        elif length is not None:
            length = math.inf if count is None or length == math.inf else length * count
        super().__init__(source, length)
        self._period = source.length

    def describe(self) -> str:
        return f"repeat({'' if self.count is None else self.count})"

    def element(self, index: int, epoch: int) -> Any:
        repetition, offset = self._split_index(index)
        return self.source.element(offset, epoch * self._stride + repetition)

    def select_rows(self, index: int, epoch: int, select: RowSelector) -> Any:
        repetition, offset = self._split_index(index)
        return self.source.select_rows(offset, epoch * self._stride + repetition, select)

    def batch(self, start: int, stop: int, epoch: int) -> Any:
        pieces = []
        while start < stop:
            repetition, offset = self._split_index(start)
            end = offset + stop - start
            if self._period is not None and end > self._period:
                end = int(self._period)
            pieces.append(self.source.batch(offset, end, epoch * self._stride + repetition))
            start += end - offset
        return concatenate(pieces)

    def gather(self, indices: Indices, epoch: int) -> Any:
        if self._period is None or self._period == math.inf:
            return self.source.gather(indices, epoch * self._stride)
        if self._period > LARGEST_INDEX:
            return super().gather(indices, epoch)
        repetitions, offsets = np.divmod(indices, np.int64(self._period))
        passes = np.unique(repetitions).tolist()
        if len(passes) == 1:
            return self.source.gather(offsets, epoch * self._stride + passes[0])
        rows = [np.flatnonzero(repetitions == repetition) for repetition in passes]
        pieces = [
            self.source.gather(offsets[where], epoch * self._stride + repetition)
            for where, repetition in zip(rows, passes, strict=True)
        ]
        return take(concatenate(pieces), np.argsort(np.concatenate(rows)))

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        if self.random_access:
            yield from super().iterate(epoch, start)
            return
        points = self.resume_points
        position, (repetition, offset) = (
            (0, (0, 0)) if points is None else points.resume(epoch, start)
        )
        while self.count is None or repetition < self.count:
            for element in self.source.iterate(epoch * self._stride + repetition, offset):
                position, offset = position + 1, offset + 1
                if points is not None:
                    points.add(epoch, position, [repetition, offset])
                if position > start:
                    yield element
            if (
                offset == 0
            ):  # An empty repetition: all others are empty too; endless, it would hang.
                return
            repetition, offset = repetition + 1, 0

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        assert self.resume_points is not None
        repetition, offset = self.resume_points.find(epoch, position)[1]
        return epoch * self._stride + repetition, offset

    def origin(self, index: int, epoch: int) -> int | None:
        repetition, offset = self._split_index(index)
        return self.source.origin(offset, epoch * self._stride + repetition)

    def _split_index(self, index: int) -> tuple[int, int]:
        """Return the repetition of an index, and the offset in it."""
        if self._period is None or self._period == math.inf:
            return 0, index
        return divmod(index, int(self._period))


class Take(_SamePositions):
    """Take: the first ``count`` elements."""

    def __init__(self, source: Node, count: int) -> None:
        self._count = check_count("take", "n", count, 0, "leave take() out to have all elements")
        length: Length = None
        if self._count == 0:
            length = 0
        elif source.length is not None:
            length = int(min(source.length, self._count))
        super().__init__(source, length)

    def describe(self) -> str:
        return f"take({self._count})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        wanted = max(0, self._count - start)
        return itertools.islice(self.source.iterate(epoch, start), wanted)


class Skip(_Transform):
    """Skip: all but the first ``count`` elements."""

    def __init__(self, source: Node, count: int) -> None:
        self._count = check_count("skip", "n", count, 0, "use take() to keep only the first ones")
        length = source.length
        if isinstance(length, int):
            length = max(0, length - self._count)
        super().__init__(source, length)

    def describe(self) -> str:
        return f"skip({self._count})"

    def element(self, index: int, epoch: int) -> Any:
        return self.source.element(index + self._count, epoch)

    def gather(self, indices: Indices, epoch: int) -> Any:
        if not self._fits_int64(indices, 1, self._count):
            return super().gather(indices, epoch)
        return self.source.gather(indices + self._count, epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Any:
        return self.source.batch(start + self._count, stop + self._count, epoch)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        return self.source.iterate(*self.upstream(epoch, start))

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        return epoch, position + self._count

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index + self._count, epoch)


class Shard(_Transform):
    """Shard: elements ``index``, ``index + num``, ``index + 2 * num`` and so on."""

    def __init__(self, source: Node, num: int, index: int) -> None:
        self._num = check_count("shard", "num", num, 1)
        self._index = check_count("shard", "index", index, 0)
        if self._index >= self._num:
            raise DatasetError(
                f"shard: expected index to be one of 0 to {self._num - 1} for num={self._num}; "
                f"got {self._index}"
            )
        length = source.length
        if isinstance(length, int):
            length = max(0, -(-(length - self._index) // self._num))
        super().__init__(source, length)

    def describe(self) -> str:
        return f"shard({self._num}, {self._index})"

    def element(self, index: int, epoch: int) -> Any:
        return self.source.element(index * self._num + self._index, epoch)

    def gather(self, indices: Indices, epoch: int) -> Any:
        if not self._fits_int64(indices, self._num, self._index):
            return super().gather(indices, epoch)
        return self.source.gather(indices * self._num + self._index, epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Any:
        if stop > LARGEST_INDEX:
            return super().batch(start, stop, epoch)
        return self.gather(np.arange(start, stop, dtype=np.int64), epoch)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        elements = self.source.iterate(*self.upstream(epoch, start))
        return itertools.islice(elements, 0, None, self._num)

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        return epoch, position * self._num + self._index

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index * self._num + self._index, epoch)
