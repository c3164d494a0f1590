"""Filter: the elements for which a predicate is true."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dvkernels.data.array_nest import Element
from dvkernels.data.checks import check_function
from dvkernels.data.error_policy import outcome_of
from dvkernels.data.node import Node, callable_name
from dvkernels.data.transform import Transform

__all__: list[str] = []


class Filter(Transform):
    """Filter: the elements for which ``predicate(element)`` is true; sequential."""

    has_resume_points = True
    initial_resume_value = 0  # The number of elements of the source tested so far.

    def __init__(self, source: Node, predicate: Callable[[Element], object]) -> None:
        check_function("filter", predicate, "pass a function of one element")
        super().__init__(source, 0 if source.length == 0 else None)
        self.random_access = False
        self._predicate = predicate

    def describe(self) -> str:
        return f"filter({callable_name(self._predicate)})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        position, begin = self.resume(epoch, start)
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

    def _passes(self, element: Element, index: int, epoch: int) -> bool:
        outcome = outcome_of(lambda argument: bool(self._predicate(argument)), element)
        return any(self._value_unless_skipped(outcome, index, epoch))
