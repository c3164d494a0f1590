"""What can be done to a dataset, one node each; the shuffle has a file of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dvkernels.data.array_nest import concatenate, owned, slice_rows, take
from dvkernels.data.checks import LARGEST_INDEX, check_count, check_flag, check_function_of_one
from dvkernels.data.error_policy import skipping
from dvkernels.data.map_workers import KINDS, MapWorkers, check_sendable
from dvkernels.data.node import (
    Cut,
    Indices,
    Length,
    Node,
    add_note,
    callable_name,
)
from dvkernels.data.outcome import Outcome, outcome_of
from dvkernels.data.stacking import Stack
from dvkernels.errors import DatasetError
from dvkernels.user_errors import shown

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

# Epochs of one endless repeat are this far apart: no two of its repetitions share an epoch.
_ENDLESS_STRIDE = 2**32


class _Transform(Node):
    """A node with a source, which knows where to look for an element of its own."""

    source: Node

    def __init__(self, source: Node, length: Length) -> None:
        self.source = source
        self.length = length
        self.random_access = source.random_access

    def _fits(self, indices: Indices, factor: int, offset: int) -> bool:
        """Return whether indices of the source, computed from these, are small enough for arrays.

        Those of endless and of very long sources may not be; Python's integers always are.
        """
        length = self.source.length
        if length is not None and length <= LARGEST_INDEX:
            return True
        return int(indices.max()) * factor + offset <= LARGEST_INDEX

    def _kept(self, outcome: Outcome, index: int, epoch: int) -> tuple[Any, ...]:
        """Return the value of an outcome, or nothing if its error is skipped."""
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


class _InPlace(_Transform):
    """A node whose elements stand where they stand in its source."""

    def element(self, index: int, epoch: int) -> Any:
        return self.source.element(index, epoch)

    def gather(self, indices: Indices, epoch: int) -> Any:
        return self.source.gather(indices, epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Any:
        return self.source.batch(start, stop, epoch)

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index, epoch)


class Map(_Transform):
    """``fn(element)`` of every element."""

    remembers = True
    first_mark = 0  # How many elements of the source were mapped; some may have been left out.
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
                f"map: expected workers to be one of {', '.join(KINDS)}; got {shown(workers)}"
            )
        if count and workers == "processes":
            check_sendable(fn)
        super().__init__(source, source.length)
        self._fn = fn
        self._workers = MapWorkers(fn, count, workers) if count else None
        self.is_held = self._workers is not None

    def hold(self) -> object:
        return None if self._workers is None else self._workers.hold()

    def describe(self) -> str:
        return f"map({callable_name(self._fn)})"

    def element(self, index: int, epoch: int) -> Any:
        return self._apply(self.source.element(index, epoch), index, epoch)

    def elements(self, indices: Sequence[int], epoch: int) -> Iterator[Any]:
        if self._workers is None or len(indices) < 2:
            return super().elements(indices, epoch)
        given = [
            (index, self._handed_over(element))
            for index, element in self.source.attempts(indices, epoch)
        ]
        outcomes = self._workers.map([element for _, element in given])
        kept = (
            self._kept(outcome, index, epoch)
            for (index, _), outcome in zip(given, outcomes, strict=True)
        )
        return itertools.chain.from_iterable(kept)

    def _handed_over(self, element: Any) -> Any:
        """Return an element that stays as it is while workers have it."""
        return element if self.source.owns_elements else owned(element)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        if self.random_access:
            yield from super().iterate(epoch, start)
            return
        # Elements that are left out do not count, so that what lies before is mapped again.
        passed, begin = (start, start) if skipping.get() is None else (0, 0)
        if self.marks is not None:
            passed, begin = self.marks.resume(epoch, start)
        elements = self.source.iterate(epoch, begin)
        if self._workers is not None:
            outcomes: Iterator[Outcome] = self._workers.map_lazily(map(self._handed_over, elements))
        else:
            outcomes = (outcome_of(self._fn, element) for element in elements)
        for index, outcome in enumerate(outcomes, begin):
            for value in self._kept(outcome, index, epoch):
                passed += 1
                if self.marks is not None:
                    self.marks.add(epoch, passed, index + 1)
                if passed > start:
                    yield value

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        return epoch, position if self.marks is None else self.marks.find(epoch, position)[1]

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index, epoch)

    def _apply(self, element: Any, index: int, epoch: int) -> Any:
        try:
            return self._fn(element)
        except Exception as error:
            add_note(error, self.describe(), self.source, index, epoch)
            raise


class Prefetch(_InPlace):
    """The same elements; iterators hold ``depth`` of them ready."""

    def __init__(self, source: Node, depth: int) -> None:
        self.depth = check_count("prefetch", "n", depth, 0)
        super().__init__(source, source.length)

    def describe(self) -> str:
        return f"prefetch({self.depth})"

    @property
    def pipeline(self) -> tuple[str, ...]:
        return self.source.pipeline  # what is held ready changes no element and no position

    def elements(self, indices: Sequence[int], epoch: int) -> Iterator[Any]:
        return self.source.elements(indices, epoch)

    def part(self, index: int, epoch: int, cut: Cut) -> Any:
        return self.source.part(index, epoch, cut)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        return self.source.iterate(epoch, start)


def prefetch_depth(node: Node, wanted: int | None = None) -> int:
    """Return how many elements iterators hold ready: ``wanted``, or what the dataset asks for.

    None of a live source: what is held and then dropped would be lost.
    """
    if node.why_not_resumed is not None:
        return 0
    if wanted is not None:
        return wanted
    return max((link.depth for link in node.links() if isinstance(link, Prefetch)), default=0)


class Filter(_Transform):
    """The elements for which ``predicate(element)`` is true; sequential."""

    remembers = True
    first_mark = 0  # How many elements of the source have been looked at.

    def __init__(self, source: Node, predicate: Callable[[Any], object]) -> None:
        check_function_of_one("filter", predicate)
        super().__init__(source, 0 if source.length == 0 else None)
        self.random_access = False
        self._predicate = predicate

    def describe(self) -> str:
        return f"filter({callable_name(self._predicate)})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        position, begin = (0, 0) if self.marks is None else self.marks.resume(epoch, start)
        for place, element in self.source.places(epoch, begin):
            if not self._passes(element, place - 1, epoch):
                continue
            position += 1
            if self.marks is not None:
                self.marks.add(epoch, position, place)
            if position > start:
                yield element

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        assert self.marks is not None
        return epoch, self.marks.find(epoch, position)[1]

    def _passes(self, element: Any, index: int, epoch: int) -> bool:
        outcome = outcome_of(lambda given: bool(self._predicate(given)), element)
        return any(self._kept(outcome, index, epoch))


class Batch(_Transform):
    """Runs of ``size`` elements, stacked along a new leading axis."""

    def __init__(self, source: Node, size: int, drop_remainder: bool) -> None:
        self.size = check_count("batch", "size", size, 1)
        check_flag("batch", "drop_remainder", drop_remainder)
        self.drops_remainder = drop_remainder
        length = source.length
        if isinstance(length, int):
            length = length // self.size if drop_remainder else -(-length // self.size)
        super().__init__(source, length)

    owns_elements = True  # it copies what it stacks

    def describe(self) -> str:
        return f"batch({self.size}{', drop_remainder=True' if self.drops_remainder else ''})"

    def element(self, index: int, epoch: int) -> Any:
        return self.source.batch(*self._run(index), epoch)

    def part(self, index: int, epoch: int, cut: Cut) -> Any:
        if skipping.get() is not None:  # how long a batch will be, only computing it can tell
            return super().part(index, epoch, cut)
        start, stop = self._run(index)
        first, last = cut(stop - start)
        if first == last:
            return slice_rows(self.source.batch(start, start + 1, epoch), 0, 0)
        return self.source.batch(start + first, start + last, epoch)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        if self.random_access:
            yield from super().iterate(epoch, start)
            return
        elements = self.source.iterate(*self.upstream(epoch, start))
        while True:
            batch = Stack(self.size)
            for element in itertools.islice(elements, self.size):
                batch.add(element)
            if not batch.count or (batch.count < self.size and self.drops_remainder):
                return
            yield batch.finished()

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
    """``count`` passes over the source, endlessly many for None.

    Repetition r of epoch e is epoch ``e * count + r`` of the source, so that a shuffle before it
    reshuffles for each; of an endless one it is epoch ``e * 2**32 + r``.
    """

    remembers = True
    first_mark = (0, 0)  # The repetition, and the place in it.

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
        repetition, place = self._place(index)
        return self.source.element(place, epoch * self._stride + repetition)

    def part(self, index: int, epoch: int, cut: Cut) -> Any:
        repetition, place = self._place(index)
        return self.source.part(place, epoch * self._stride + repetition, cut)

    def batch(self, start: int, stop: int, epoch: int) -> Any:
        pieces = []
        while start < stop:
            repetition, place = self._place(start)
            end = place + stop - start
            if self._period is not None and end > self._period:
                end = int(self._period)
            pieces.append(self.source.batch(place, end, epoch * self._stride + repetition))
            start += end - place
        return concatenate(pieces)

    def gather(self, indices: Indices, epoch: int) -> Any:
        if self._period is None or self._period == math.inf:
            return self.source.gather(indices, epoch * self._stride)
        if self._period > LARGEST_INDEX:
            return super().gather(indices, epoch)
        repetitions, places = np.divmod(indices, np.int64(self._period))
        passes = np.unique(repetitions).tolist()
        if len(passes) == 1:
            return self.source.gather(places, epoch * self._stride + passes[0])
        rows = [np.flatnonzero(repetitions == repetition) for repetition in passes]
        pieces = [
            self.source.gather(places[where], epoch * self._stride + repetition)
            for where, repetition in zip(rows, passes, strict=True)
        ]
        return take(concatenate(pieces), np.argsort(np.concatenate(rows)))

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        if self.random_access:
            yield from super().iterate(epoch, start)
            return
        marks = self.marks
        position, (repetition, place) = (0, (0, 0)) if marks is None else marks.resume(epoch, start)
        while self.count is None or repetition < self.count:
            for element in self.source.iterate(epoch * self._stride + repetition, place):
                position, place = position + 1, place + 1
                if marks is not None:
                    marks.add(epoch, position, [repetition, place])
                if position > start:
                    yield element
            if place == 0:  # Empty. So would be all the others, and an endless one would hang.
                return
            repetition, place = repetition + 1, 0

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        assert self.marks is not None
        repetition, place = self.marks.find(epoch, position)[1]
        return epoch * self._stride + repetition, place

    def origin(self, index: int, epoch: int) -> int | None:
        repetition, place = self._place(index)
        return self.source.origin(place, epoch * self._stride + repetition)

    def _place(self, index: int) -> tuple[int, int]:
        if self._period is None or self._period == math.inf:
            return 0, index
        return divmod(index, int(self._period))


class Take(_InPlace):
    """The first ``count`` elements."""

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
    """All but the first ``count`` elements."""

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
        if not self._fits(indices, 1, self._count):
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
    """Elements ``index``, ``index + num``, ``index + 2 * num`` and so on."""

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
        if not self._fits(indices, self._num, self._index):
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
