"""Philox: random generators keyed by seed and name, with step and replica in the counter.

Philox [1]_ is a keyed permutation: output block n of a stream is the permutation of n, a counter of
256 bits, under a key of 128 bits; it has four numbers of 64 bits. The key is a hash of the seed and
of what names the streams. The counter's words of 64 bits, lowest first, are

====  ==============================  ===================================
word  ``ctx.rng``                     ``random_map``
====  ==============================  ===================================
0     block within the stream         block within the stream
1     step; in ``map``: item          index of the element, lower 64 bits
2     0                               0
3     replica id; ``map``: 2**64 - 1  index of the element, upper 64 bits
====  ==============================  ===================================

So streams of one key differ in a word of all their counters, and cannot overlap before 2**64 blocks
(2**66 numbers) are drawn from one: at a number a nanosecond, after 2300 years. Word 2 is what
``jumped`` of NumPy counts in. Two keys are equal with probability 2**-128 for each pair of names.

.. [1] J. K. Salmon et al., SC11, doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from dvkernels.user_errors import brief

__all__: list[str] = []

LARGEST_SEED = 2**1024 - 1
# Word 3 of streams that belong to no replica.
_OF_ITEM = 2**64 - 1  # of ``map``: word 1 is the index of the item
_OUTSIDE = 2**64 - 2  # outside of every scope and ``run``: word 1 is 0

_WORD = 2**64 - 1

# Number of the step or map, and words 1 and 3 of the counter.
_Position = tuple[int, int, int]


def check_seed(seed: Any) -> int:
    """Return a seed as an int; raise unless it is a non-negative integer of up to 1024 bits."""
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool):
        raise TypeError(
            f"seed: expected a non-negative integer; got {brief(seed)}, a {type(seed).__name__}; "
            f"pass an int, such as 0 or secrets.randbits(128)"
        )
    if not 0 <= seed <= LARGEST_SEED:
        got = brief(int(seed)) if seed < 0 else f"one of {int(seed).bit_length()} bits"
        raise ValueError(
            f"seed: expected a non-negative integer of at most 1024 bits; got {got}; pass an int, "
            f"such as 0 or secrets.randbits(128)"
        )
    return int(seed)


@functools.lru_cache(maxsize=1024)
def key_of(kind: str, seed: int, *names: str | int) -> tuple[int, int]:
    """Return the key of the streams of ``kind`` that have this seed and these names.

    Only the last name may contain a slash.
    """
    text = "/".join(str(part) for part in (kind, seed, *names))
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _move(generator: np.random.Generator, key: tuple[int, int], word_1: int, word_3: int) -> None:
    """Move a generator to the beginning of a stream.

    That takes a tenth of the time of making one; items of tuples are read faster than of arrays.
    """
    generator.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": (0, word_1, 0, word_3), "key": key},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,  # the buffer has been used up
        "has_uint32": 0,
        "uinteger": 0,
    }


def _made() -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=0))


def _taken(
    take: Callable[[], np.random.Generator | None],
) -> tuple[np.random.Generator | None, int, int]:
    """Return what ``take`` returns, and the reference counts of it and of its bit generator."""
    generator = take()
    bits = None if generator is None else generator.bit_generator
    return generator, sys.getrefcount(generator), sys.getrefcount(bits)


@functools.cache
def _unshared_counts() -> tuple[int, int]:
    """Return the reference counts of a generator that only :func:`_taken` refers to."""
    return _taken(_made)[1:]


def _unshared(take: Callable[[], np.random.Generator | None]) -> np.random.Generator:
    """Return the generator that ``take`` returns; a new one if anything else refers to that one.

    So a generator that somebody has kept goes on with its own stream.
    """
    generator, *counts = _taken(take)
    return _made() if generator is None or tuple(counts) != _unshared_counts() else generator


class _StepGenerators:
    """Random generators of one replica, by name: those of a step serve the next one again.

    Several threads of a replica may ask for a generator at once. No lock is held: of what several
    of them make, ``setdefault`` chooses one.
    """

    __slots__ = ("_generators", "_spare")

    def __init__(self) -> None:
        self._generators: dict[_Position, dict[str, np.random.Generator]] = {}
        self._spare: dict[str, np.random.Generator] = {}  # of the step before

    def get(self, seed: int, name: str, run: int, word_1: int, word_3: int) -> np.random.Generator:
        if not isinstance(name, str):
            raise TypeError(
                f"rng: expected name to be a str; got {brief(name)}, a {type(name).__name__}; call "
                f"a method of the Generator to choose the distribution and the dtype"
            )
        position = run, word_1, word_3
        generators = self._generators.get(position)
        if generators is None:
            generators = self._begin(position)
        generator = generators.get(name)
        if generator is None:
            generator = _unshared(functools.partial(self._spare.pop, name, None))
            _move(generator, key_of("rng", seed, name), word_1, word_3)
            generator = generators.setdefault(name, generator)
        return generator

    def _begin(self, position: _Position) -> dict[str, np.random.Generator]:
        generators = self._generators.setdefault(position, {})
        for other in [*self._generators]:
            if other != position:
                self._spare = self._generators.pop(other, self._spare)
        return generators


class StrategyGenerators:
    """Random generators of a strategy's local replicas, and what they depend on.

    Attributes
    ----------
    seed : int
    num_done : int
        The number of steps that have ended without an error, and so the number of the step under
        way: a step that failed is tried again with the same draws. Not those within another step.
    num_begun : int
        The number of steps and maps that have begun; each draws from the beginning of its streams.
    """

    __slots__ = ("_of_rank", "_outside", "num_begun", "num_done", "seed")

    def __init__(self, seed: Any = 0, num_local: int = 1) -> None:
        self.seed = check_seed(seed)
        self.num_done = 0
        self.num_begun = 0
        self._of_rank = [_StepGenerators() for _ in range(num_local)]
        self._outside = _StepGenerators()

    def load(self, seed: int, num_done: int) -> None:
        """Set seed and step count; all generators begin anew."""
        self.seed, self.num_done, self.num_begun = seed, num_done, self.num_begun + 1
        self._outside = _StepGenerators()

    def of_replica(self, rank: int, replica_id: int, name: str) -> np.random.Generator:
        """Return the generator of a replica for the step under way."""
        return self._of_rank[rank].get(self.seed, name, self.num_begun, self.num_done, replica_id)

    def of_item(self, rank: int, index: int, name: str) -> np.random.Generator:
        """Return the generator of an item of ``map``, which a replica of this rank works on."""
        return self._of_rank[rank].get(self.seed, name, self.num_begun, index, _OF_ITEM)

    def outside(self, name: str) -> np.random.Generator:
        """Return the generator of code outside of every scope, which goes on from call to call."""
        return self._outside.get(self.seed, name, 0, 0, _OUTSIDE)


class _Spare(threading.local):
    """Spare generator of a thread; None while one is in use."""

    generator: np.random.Generator | None = None

    def take(self) -> np.random.Generator | None:
        generator, self.generator = self.generator, None
        return generator


_spare = _Spare()


def call_with_generator(
    fn: Callable[[Any, np.random.Generator], Any], value: Any, key: tuple[int, int], index: int
) -> Any:
    """Return ``fn(value, generator)``, with the thread's generator at the stream of ``index``."""
    generator = _unshared(_spare.take)
    _move(generator, key, index & _WORD, index >> 64)
    try:
        return fn(value, generator)
    finally:
        _spare.generator = generator
