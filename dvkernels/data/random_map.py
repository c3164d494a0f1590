"""Random map: a function of every element and of a random generator, keyed by the element."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dvkernels.data.array_nest import Element
from dvkernels.data.checks import check_count, check_function
from dvkernels.data.map import Application
from dvkernels.data.node import Node, add_note, callable_name
from dvkernels.philox import LARGEST_SEED, call_with_generator, key_of

__all__: list[str] = []


class _Draw:
    """Function of an element, its number and the epoch, which draws from the element's stream.

    It can be pickled if the user's function can.
    """

    def __init__(
        self, fn: Callable[[Element, np.random.Generator], Element], seed: int, place: int
    ) -> None:
        self.fn = fn
        self.seed = seed
        self.place = place
        self.__qualname__ = callable_name(fn)

    def __call__(self, given: tuple[Element, int, int]) -> Element:
        element, number, epoch = given
        key = key_of("random_map", self.seed, self.place, epoch)
        return call_with_generator(self.fn, element, key, number)


class RandomMap(Application):
    """Random map: ``fn(element, rng)`` for every element.

    The stream of ``rng`` is a function of the seed, the place (how many random maps lie upstream),
    the epoch of this node, and the number of the element: its index among the elements of the
    source, of all shards together.
    """

    _fn: _Draw

    def __init__(
        self,
        source: Node,
        fn: Callable[[Element, np.random.Generator], Element],
        seed: int,
        num_workers: int = 0,
        workers: str = "threads",
    ) -> None:
        check_function("random_map", fn, "pass a function of an element and a generator")
        seed = check_count("random_map", "seed", seed, 0, maximum=LARGEST_SEED)
        place = sum(isinstance(link, RandomMap) for link in source.links())
        super().__init__(source, "random_map", _Draw(fn, seed, place), num_workers, workers)

    def describe(self) -> str:
        return f"random_map({callable_name(self._fn)}, seed={self._fn.seed})"

    def element(self, index: int, epoch: int) -> Element:
        element = self.source.element(index, epoch)
        step, first = self.interleaving
        try:
            return self._fn((element, first + step * index, epoch))
        except Exception as error:
            add_note(error, self.describe(), self.source, index, epoch)
            raise

    def _arguments(
        self, elements: Iterable[Element], indices: Iterable[int], epoch: int
    ) -> Iterable[Any]:
        step, first = self.interleaving
        numbers = (first + step * index for index in indices)
        return zip(elements, numbers, itertools.repeat(epoch), strict=False)
