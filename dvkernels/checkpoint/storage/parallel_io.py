"""Bytes between memory and files, block by block, with their checksums, on all usable cores.

A tensor is cut into pieces of 16 MiB, each with a checksum of its own, so that several cores share
even a single large one. A piece goes in blocks of 1 MiB: what has been hashed is still in the
core's cache when it is written, and what has been read when it is hashed. So the memory is passed
over once, and no second copy of it is made.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from dvkernels.checkpoint.storage import files
from dvkernels.devices import cpu
from dvkernels.errors import CheckpointDamagedError
from dvkernels.threads import shielded

__all__: list[str] = []

PIECE_NBYTES = 16 << 20  # of the format: changing it changes what files hold
BLOCK_NBYTES = 1 << 20


class Piece(NamedTuple):
    """Bytes of a tensor, in memory and in a file."""

    descriptor: int
    offset: int
    # Where they lie in memory, as arrays of uint8. To write: one. To read: all that get them; none
    # to check them only.
    places: tuple[Any, ...]
    nbytes: int
    checksum: str  # to read: the one expected
    where: str  # for messages


def bytes_of(array: Any) -> Any:
    """Return a contiguous array as uint8, without a copy."""
    return array.reshape(-1).view(np.uint8)


def cut(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield where the pieces of so many bytes begin and end."""
    for begin in range(0, nbytes, PIECE_NBYTES):
        yield begin, min(begin + PIECE_NBYTES, nbytes)


def checksum(data: Any) -> str:
    """Return the checksum of some bytes: XXH3, 64 bits, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """Write all of the data, in as many operations as it takes."""
    left = memoryview(data)
    while left:
        count = files.active.write(descriptor, left, offset)
        if count <= 0:
            raise OSError("the disk took no bytes, and gave no reason")
        left = left[count:]
        offset += count


def read_all(descriptor: int, nbytes: int, offset: int, where: str) -> bytes:
    """Return so many bytes of a file; :class:`CheckpointDamagedError` if it ends before."""
    content = bytearray(nbytes)
    _fill(descriptor, memoryview(content), offset, where)
    return bytes(content)


def write(pieces: Sequence[Piece], block_nbytes: int = BLOCK_NBYTES) -> list[str]:
    """Write pieces, and return their checksums."""

    def write_piece(piece: Piece) -> str:
        digest = xxhash.xxh3_64()
        for begin, end in _blocks(piece, block_nbytes):
            block = piece.places[0][begin:end]
            digest.update(block)
            write_all(piece.descriptor, block, piece.offset + begin)
        return digest.hexdigest()

    return in_parallel(write_piece, pieces)


def check(pieces: Sequence[Piece]) -> None:
    """Read pieces and compare their checksums; nothing is kept."""
    here = threading.local()

    def check_piece(piece: Piece) -> None:
        if not hasattr(here, "block"):
            here.block = np.empty(BLOCK_NBYTES, np.uint8)
        digest = xxhash.xxh3_64()
        for begin, end in _blocks(piece):
            block = here.block[: end - begin]
            _fill(piece.descriptor, memoryview(block), piece.offset + begin, piece.where)
            digest.update(block)
        _compare(piece, digest.hexdigest())

    in_parallel(check_piece, pieces)


def load(pieces: Sequence[Piece]) -> None:
    """Read pieces to where they belong."""

    def load_piece(piece: Piece) -> None:
        digest = xxhash.xxh3_64()
        for begin, end in _blocks(piece):
            first, *others = (place[begin:end] for place in piece.places)
            _fill(piece.descriptor, memoryview(first), piece.offset + begin, piece.where)
            digest.update(first)
            for other in others:
                np.copyto(other, first)
        _compare(piece, digest.hexdigest())

    in_parallel(load_piece, pieces)


def copy(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Copy arrays: each source into its target, both contiguous, of one size and dtype."""
    pieces = [
        (bytes_of(target)[begin:end], bytes_of(source)[begin:end])
        for target, source in pairs
        for begin, end in cut(source.nbytes)
    ]
    in_parallel(lambda pair: np.copyto(*pair), pieces)


def in_parallel(act: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return ``[act(item) for item in items]``, worked out by as many threads as there are cores.

    The caller is one of them; where no others are to be had it works alone. The first error ends
    the work and is raised.
    """
    work = _Work(act, items)
    for _ in range(min(cpu.usable_cores(), len(items)) - 1):
        try:
            # Not threading.Thread, whose start waits without end for one that finds no memory.
            _thread.start_new_thread(work.help, ())
        except (RuntimeError, MemoryError):
            break
    work.go_on()
    while not work.is_done:
        try:
            work.wait()
        except BaseException as error:
            work.end(error)
    if work.errors:
        try:
            raise work.errors[0]
        finally:
            work.errors.clear()  # their tracebacks refer to this frame
    return work.results


class _Work:
    """Items that several threads take one after another; what they share changes atomically."""

    def __init__(self, act: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.results: list[Any] = [None] * len(items)
        self.errors: list[BaseException] = []
        self._errand = shielded.current()
        self._is_over = False  # what has not been taken is left
        self._act = act
        self._items = items
        self._places = iter(range(len(items)))
        self._is_exhausted = not items
        self._helpers: set[int] = set()  # at work
        self._bell = _thread.allocate_lock()
        self._bell.acquire()

    def help(self) -> None:
        """Do what there is to do, in a thread of its own."""
        own = _thread.get_ident()
        try:
            self._helpers.add(own)
            self.go_on()
        except MemoryError as error:
            self.end(error)
        finally:
            self._helpers.discard(own)
            with contextlib.suppress(RuntimeError):  # it rings already
                self._bell.release()

    def go_on(self) -> None:
        """Do what there is to do."""
        try:
            while not self._is_over:
                if self._errand is not None:
                    self._errand.check()
                place = next(self._places, None)
                if place is None:
                    self._is_exhausted = True
                    return
                self.results[place] = self._act(self._items[place])
        except BaseException as error:
            self.end(error)

    def end(self, error: BaseException) -> None:
        """Leave what nobody has taken yet."""
        self._is_over = True
        self.errors.append(error)

    @property
    def is_done(self) -> bool:
        """Whether nothing is being worked on, or will be.

        In this order: who has taken an item before all were taken was among the helpers then.
        """
        return (self._is_over or self._is_exhausted) and not self._helpers

    def wait(self) -> None:
        """Return when a helper has ended, or after a while."""
        if not self._bell.acquire(timeout=0.1):
            alive = sys._current_frames()
            for helper in [each for each in self._helpers if each not in alive]:
                self._helpers.discard(helper)  # it found no memory to say that it has ended
                self.end(MemoryError())


def _blocks(piece: Piece, nbytes: int = BLOCK_NBYTES) -> Iterator[tuple[int, int]]:
    starts = itertools.chain(range(0, piece.nbytes, nbytes), (piece.nbytes,))
    return itertools.pairwise(starts)


def _fill(descriptor: int, buffer: memoryview, offset: int, where: str) -> None:
    while buffer:
        count = files.active.read(descriptor, buffer, offset)
        if count <= 0:
            raise CheckpointDamagedError(
                f"{where}: expected {len(buffer)} more bytes at {offset}; the file ends there; it "
                f"has been cut off"
            )
        buffer = buffer[count:]
        offset += count


def _compare(piece: Piece, found: str) -> None:
    if found != piece.checksum:
        raise CheckpointDamagedError(
            f"{piece.where}: expected the checksum {piece.checksum} for {piece.nbytes} bytes at "
            f"{piece.offset}; got {found}; the file is damaged"
        )
