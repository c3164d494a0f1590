"""Map: a function applied to every element, by worker threads or processes where asked."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dvkernels.data.array_nest import Element, owned_copy
from dvkernels.data.checks import check_count, check_function
from dvkernels.data.error_policy import outcome_of, skipping
from dvkernels.data.map_workers import KINDS, MapWorkers
from dvkernels.data.node import Node, add_note, callable_name
from dvkernels.data.transform import Transform
from dvkernels.errors import DatasetError
from dvkernels.user_errors import brief

__all__: list[str] = []


class Application(Transform):
    """Base class of the transforms that apply a function to every element of their source."""

    has_resume_points = True
    initial_resume_value = 0  # The number of elements of the source mapped so far, or skipped.
    owns_elements = False

    def __init__(
        self, source: Node, verb: str, fn: Callable[[Any], Element], num_workers: int, workers: str
    ) -> None:
        count = check_count(verb, "num_workers", num_workers, 0)
        if workers not in KINDS:
            raise DatasetError(
                f"{verb}: expected workers to be one of {', '.join(KINDS)}; got {brief(workers)}"
            )
        super().__init__(source, source.length)
        self._fn = fn
        self._workers = MapWorkers(fn, count, workers) if count else None

    @abc.abstractmethod
    def _arguments(
        self, elements: Iterable[Element], indices: Iterable[int], epoch: int
    ) -> Iterable[Any]:
        """Return what the function is given for the elements of the source at ``indices``."""

    def hold_workers(self) -> object:
        return None if self._workers is None else self._workers.hold()

    def elements(self, indices: Sequence[int], epoch: int) -> Iterator[Element]:
        if self._workers is None or len(indices) < 2:
            return super().elements(indices, epoch)
        attempted: list[int] = []
        given = []
        for index, element in self.source.attempts(indices, epoch):
            attempted.append(index)
            given.append(self._unshared(element))
        # All at once, since an error's traceback would keep a suspended generator's threads alive.
        outcomes = [*self._workers.map([*self._arguments(given, attempted, epoch)])]
        kept = (
            self._value_unless_skipped(outcome, index, epoch)
            for index, outcome in zip(attempted, outcomes, strict=True)
        )
        return itertools.chain.from_iterable(kept)

    def _unshared(self, element: Element) -> Any:
        """Return the element, copied if user code could change it while workers use it."""
        return element if self.source.owns_elements else owned_copy(element)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        # Skipped elements do not count as positions, so the elements before are mapped again.
        num_yielded, begin = (start, start) if skipping.get() is None else (0, 0)
        if self.resume_points is not None:
            num_yielded, begin = self.resume_points.resume(epoch, start)
        elements = self.source.iterate(epoch, begin)
        if self._workers is not None:
            elements = map(self._unshared, elements)
        given = self._arguments(elements, itertools.count(begin), epoch)
        if self._workers is not None:
            outcomes = self._workers.map_lazily(given)
        else:
            outcomes = (outcome_of(self._fn, argument) for argument in given)
        for index, outcome in enumerate(outcomes, begin):
            for value in self._value_unless_skipped(outcome, index, epoch):
                num_yielded += 1
                if self.resume_points is not None:
                    self.resume_points.add(epoch, num_yielded, index + 1)
                if num_yielded > start:
                    yield value

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        points = self.resume_points
        return epoch, position if points is None else points.find(epoch, position)[1]

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index, epoch)


class Map(Application):
    """Map: ``fn(element)`` for every element."""

    def __init__(
        self,
        source: Node,
        fn: Callable[[Element], Element],
        num_workers: int = 0,
        workers: str = "threads",
    ) -> None:
        check_function("map", fn, "pass a function of one element")
        super().__init__(source, "map", fn, num_workers, workers)

    def describe(self) -> str:
        return f"map({callable_name(self._fn)})"

    def element(self, index: int, epoch: int) -> Element:
        element = self.source.element(index, epoch)
        try:
            return self._fn(element)
        except Exception as error:
            add_note(error, self.describe(), self.source, index, epoch)
            raise

    def _arguments(
        self, elements: Iterable[Element], indices: Iterable[int], epoch: int
    ) -> Iterable[Any]:
        return elements
