"""Shuffle by a keyed permutation of the indices, in O(1) memory.

The permutation of [0, n) is a balanced Feistel network over pairs of digits to the base
a = ceil(sqrt(n)), with addition modulo a, and cycle walking: an output outside [0, n) is
encrypted again until it falls inside [1]_. Of the a * a points fewer than 2a are outside, so
walking is rare; a network over bits, with up to 4n points, spent most of its time walking.
Arithmetic is on unsigned 64-bit integers only, so the order is the same on every machine and
with every version of NumPy.

.. [1] J. Black, P. Rogaway, CT-RSA 2002, LNCS 2271, 114-130, doi:10.1007/3-540-45760-7_9.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator

import numpy as np

from dvkernels.data.array_nest import Element, owned_copy
from dvkernels.data.checks import LARGEST, LARGEST_INDEX, check_count, check_flag
from dvkernels.data.node import Indices, Node
from dvkernels.data.transform import Transform
from dvkernels.errors import DatasetError
from dvkernels.kernels import backends
from dvkernels.philox import LARGEST_SEED

__all__: list[str] = []

# Consecutive positions that are permuted at once and cached: 32 KiB, the size of an L1 cache.
BLOCK_LENGTH = 4096

# Rounds of the Feistel network. For a small base eight rounds do not make all orders equally
# likely (chi-squared test over the orders of 5 elements in tests/unit/data).
_NUM_ROUNDS = 8
_NUM_ROUNDS_SMALL = 24
_SMALL_BASE = 16


@functools.lru_cache(maxsize=64)
def round_keys(seed: int, epoch: int, *window: int) -> tuple[int, ...]:
    """Return the round keys of the permutation of (seed, epoch), integers of any size.

    ``window`` is the number of the window, if only one window of the epoch is permuted.
    """
    text = "/".join(str(part) for part in (seed, epoch, *window))
    digest = hashlib.shake_256(text.encode()).digest(8 * _NUM_ROUNDS_SMALL)
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8))


def permute(positions: Indices, length: int, keys: tuple[int, ...]) -> Indices:
    """Return the image of each position under the keyed permutation of [0, length).

    Parameters
    ----------
    positions : array of shape (n,), int64
        Positions in [0, length).
    length : int
        The number of elements that are permuted.
    keys : tuple of int
        The round keys, as :func:`round_keys` returns them.

    Returns
    -------
    array of shape (n,), int64

    Examples
    --------
    >>> order = permute(np.arange(10), 10, round_keys(seed=1, epoch=0))
    >>> sorted(order.tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    base = math.isqrt(max(0, length - 1)) + 1
    num_rounds = _NUM_ROUNDS if base > _SMALL_BASE else _NUM_ROUNDS_SMALL
    # Most Feistel networks are even permutations; one more swap makes half of them odd.
    swaps = bool(keys[-1] & 1) and length > 1
    used_keys = np.array(keys[:num_rounds], np.uint64)
    order: Indices = backends.permutation().permute(positions, length, base, used_keys, swaps)
    return order


class Shuffle(Transform):
    """Shuffle of all elements of ``source``, in an order that is a function of (seed, epoch)."""

    length: int

    def __init__(self, source: Node, seed: int, reshuffle_each_epoch: bool) -> None:
        seed = _check_seed(seed, reshuffle_each_epoch)
        if not source.random_access or source.length is None:
            raise DatasetError(
                f"shuffle: expected a dataset with random access; got {source!r}, which can only "
                "be read in order; pass window=n to shuffle within windows of n elements, "
                "shuffle before filter(), or materialise the elements: "
                "Dataset.from_sequence(list(dataset))"
            )
        if source.length == math.inf:
            raise DatasetError(
                f"shuffle: expected a dataset that ends; got {source!r}, which is endless; "
                "shuffle before repeat(): each repetition is then shuffled anew"
            )
        if source.length > LARGEST:
            raise DatasetError(
                f"shuffle: expected at most 2**62 elements; got {source.length}; shuffle before "
                "repeat()"
            )
        super().__init__(source, int(source.length))
        self._seed = seed
        self._reshuffles = reshuffle_each_epoch
        # (epoch, block number, its permuted positions): replaced as a whole, never modified.
        self._latest: tuple[int, int, Indices] = (-1, -1, np.empty(0, np.int64))

    def describe(self) -> str:
        once = "" if self._reshuffles else ", reshuffle_each_epoch=False"
        return f"shuffle(seed={self._seed}{once})"

    def element(self, index: int, epoch: int) -> Element:
        return self.source.element(self._permuted(index, epoch), epoch)

    def gather(self, indices: Indices, epoch: int) -> Element:
        return self.source.gather(permute(indices, self.length, self._keys(epoch)), epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Element:
        first, last = start // BLOCK_LENGTH, (stop - 1) // BLOCK_LENGTH
        if first == last:
            offset = first * BLOCK_LENGTH
            indices = self._block(first, epoch)[start - offset : stop - offset]
        else:
            blocks = [self._block(number, epoch) for number in range(first, last + 1)]
            offset = first * BLOCK_LENGTH
            indices = np.concatenate(blocks)[start - offset : stop - offset]
        return self.source.gather(indices, epoch)

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(self._permuted(index, epoch), epoch)

    def _permuted(self, index: int, epoch: int) -> int:
        number, offset = divmod(index, BLOCK_LENGTH)
        return int(self._block(number, epoch)[offset])

    def _keys(self, epoch: int) -> tuple[int, ...]:
        return round_keys(self._seed, epoch if self._reshuffles else 0)

    def _block(self, number: int, epoch: int) -> Indices:
        latest_epoch, latest_number, block = self._latest
        if latest_number != number or latest_epoch != epoch:
            start = number * BLOCK_LENGTH
            positions = np.arange(start, min(start + BLOCK_LENGTH, self.length), dtype=np.int64)
            block = permute(positions, self.length, self._keys(epoch))
            block.flags.writeable = False
            self._latest = (epoch, number, block)
        return block


class WindowedShuffle(Transform):
    """Shuffle within consecutive windows of ``window`` elements.

    No element moves further than a window. The first window of an epoch is shorter by a number
    drawn from (seed, epoch), so that elements in different windows of one epoch share a window in
    another. The order within a window is a function of (seed, epoch, window number, length), so
    random access is kept, and a sequential source is resumed at the start of a window.
    """

    def __init__(self, source: Node, seed: int, window: int, reshuffle_each_epoch: bool) -> None:
        self._seed = _check_seed(seed, reshuffle_each_epoch)
        self._window = check_count(
            "shuffle", "window", window, 1, "leave it out to shuffle the whole dataset"
        )
        self._reshuffles = reshuffle_each_epoch
        super().__init__(source, source.length)
        # (epoch, window number, its order): replaced as a whole, never modified.
        self._latest: tuple[int, int, Indices] = (-1, -1, np.empty(0, np.int64))

    def describe(self) -> str:
        once = "" if self._reshuffles else ", reshuffle_each_epoch=False"
        return f"shuffle(seed={self._seed}, window={self._window}{once})"

    @property
    def owns_elements(self) -> bool:
        return not self.random_access or self.source.owns_elements

    def element(self, index: int, epoch: int) -> Element:
        return self.source.element(self._permuted(index, epoch), epoch)

    def gather(self, indices: Indices, epoch: int) -> Element:
        permuted = [self._permuted(index, epoch) for index in indices.tolist()]
        if max(permuted) > LARGEST_INDEX:
            return super().gather(indices, epoch)
        return self.source.gather(np.array(permuted, np.int64), epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Element:
        if stop + self._window > LARGEST_INDEX:
            return super().batch(start, stop, epoch)
        pieces = []
        while start < stop:
            number, begin, end = self._bounds(start, epoch)
            order = self._order(number, end - begin, epoch)
            pieces.append(begin + order[start - begin : stop - begin])
            start = end
        return self.source.gather(np.concatenate(pieces), epoch)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        number, begin, end = self._bounds(start, epoch)
        elements = self.source.iterate(epoch, begin)
        if not self.source.owns_elements:
            elements = map(owned_copy, elements)
        while window := list(itertools.islice(elements, end - begin)):
            order = self._order(number, len(window), epoch)
            for offset in order[start - begin :].tolist():
                yield window[offset]
            start = begin + len(window)
            number, begin, end = number + 1, end, end + self._window

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        return epoch, self._bounds(position, epoch)[1]

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(self._permuted(index, epoch), epoch)

    def _permuted(self, index: int, epoch: int) -> int:
        number, begin, end = self._bounds(index, epoch)
        return begin + int(self._order(number, end - begin, epoch)[index - begin])

    def _epoch(self, epoch: int) -> int:
        return epoch if self._reshuffles else 0

    def _bounds(self, index: int, epoch: int) -> tuple[int, int, int]:
        """Return the number, the start and the end of the window that holds ``index``."""
        shortfall = round_keys(self._seed, self._epoch(epoch))[0] % self._window
        number = (index + shortfall) // self._window
        begin = max(0, number * self._window - shortfall)
        end = (number + 1) * self._window - shortfall
        if self.length is not None and end > self.length:
            end = max(begin, int(self.length))  # an index beyond the end, after skip()
        return number, begin, end

    def _order(self, number: int, length: int, epoch: int) -> Indices:
        latest_epoch, latest_number, order = self._latest
        if latest_number != number or latest_epoch != epoch or len(order) != length:
            keys = round_keys(self._seed, self._epoch(epoch), number)
            order = permute(np.arange(length, dtype=np.int64), length, keys)
            order.flags.writeable = False
            self._latest = (epoch, number, order)
        return order


def _check_seed(seed: int, reshuffle_each_epoch: bool) -> int:
    check_flag("shuffle", "reshuffle_each_epoch", reshuffle_each_epoch)
    return check_count("shuffle", "seed", seed, 0, maximum=LARGEST_SEED)
