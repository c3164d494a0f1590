"""Checksummed reads and writes of tensors on all usable cores.

A tensor is cut into pieces of 16 MiB, each with its own checksum, so that several cores share even
a single large tensor. A piece is transferred in blocks of 1 MiB: a block is still in the core's
cache when it is written after hashing, or hashed after reading. So memory is passed over once,
without a second copy of the tensor.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar, cast

import numpy as np
import xxhash

from dvkernels import thread_frames
from dvkernels.checkpoint.storage import file_system
from dvkernels.devices import cpu
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import CheckpointDamagedError
from dvkernels.threads import shielded

__all__: list[str] = []

PIECE_NBYTES = 16 << 20  # part of the file format
BLOCK_NBYTES = 1 << 20

T = TypeVar("T")
R = TypeVar("R")


class Piece(NamedTuple):
    """Byte range of a tensor, in memory and in a file."""

    descriptor: int
    offset: int
    # uint8 arrays. For a write: the source. For a read: all targets; none to verify only.
    buffers: tuple[HostArray, ...]
    nbytes: int
    checksum: str  # for a read: the expected one
    where: str  # for messages


def bytes_of(array: HostArray) -> HostArray:
    """View a contiguous array as uint8, shape (nbytes,)."""
    return array.reshape(-1).view(np.uint8)


def cut(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield the begin and end of each piece of a tensor of ``nbytes``."""
    for begin in range(0, nbytes, PIECE_NBYTES):
        yield begin, min(begin + PIECE_NBYTES, nbytes)


def checksum(data: bytes | memoryview) -> str:
    """Return the XXH3 checksum of bytes: 64 bits, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the data, repeating after short writes."""
    left = memoryview(data)
    while left:
        count = file_system.active.write(descriptor, left, offset)
        if count <= 0:
            raise OSError("the disk accepted no bytes, without an error")
        left = left[count:]
        offset += count


def read_all(descriptor: int, nbytes: int, offset: int, where: str) -> bytes:
    """Read ``nbytes`` of a file; :class:`CheckpointDamagedError` if it ends before."""
    content = bytearray(nbytes)
    _fill(descriptor, memoryview(content), offset, where)
    return bytes(content)


def write(pieces: Sequence[Piece], block_nbytes: int = BLOCK_NBYTES) -> list[str]:
    """Write pieces in parallel; return their checksums."""

    def write_piece(piece: Piece) -> str:
        digest = xxhash.xxh3_64()
        for begin, end in _blocks(piece, block_nbytes):
            block = piece.buffers[0][begin:end].data
            digest.update(block)
            write_all(piece.descriptor, block, piece.offset + begin)
        return digest.hexdigest()

    return in_parallel(write_piece, pieces)


def load(pieces: Sequence[Piece]) -> None:
    """Read pieces in parallel into all their buffers, if any, and compare their checksums."""
    scratch = threading.local()

    def load_piece(piece: Piece) -> None:
        if not piece.buffers and not hasattr(scratch, "block"):
            scratch.block = np.empty(BLOCK_NBYTES, np.uint8)
        digest = xxhash.xxh3_64()
        for begin, end in _blocks(piece):
            targets = [buffer[begin:end] for buffer in piece.buffers]
            first: HostArray = targets[0] if targets else scratch.block[: end - begin]
            _fill(piece.descriptor, first.data, piece.offset + begin, piece.where)
            digest.update(first.data)
            for other in targets[1:]:
                np.copyto(other, first)
        if digest.hexdigest() != piece.checksum:
            raise CheckpointDamagedError(
                f"{piece.where}: expected the checksum {piece.checksum} for {piece.nbytes} bytes "
                f"at {piece.offset}; got {digest.hexdigest()}; the file is damaged"
            )

    in_parallel(load_piece, pieces)


def copy(pairs: Sequence[tuple[HostArray, HostArray]]) -> None:
    """Copy arrays in parallel, given (target, source), both contiguous, of one size and dtype."""
    pieces = [
        (bytes_of(target)[begin:end], bytes_of(source)[begin:end])
        for target, source in pairs
        for begin, end in cut(source.nbytes)
    ]
    in_parallel(lambda pair: np.copyto(*pair), pieces)


def in_parallel(act: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return ``[act(item) for item in items]``, computed by one thread per usable core.

    The calling thread is one of them, and works alone where no other can be started. The first
    error stops the work and is raised.
    """
    work = _WorkQueue(act, items)
    for _ in range(min(cpu.usable_cores(), len(items)) - 1):
        try:
            # Not threading.Thread, whose start() waits for ever if the thread runs out of memory.
            _thread.start_new_thread(work.run_worker, ())
        except (RuntimeError, MemoryError):
            break
    work.run()
    while not work.is_done:
        try:
            work.wait()
        except BaseException as error:
            work.stop(error)
    if work.errors:
        try:
            raise work.errors[0]
        finally:
            work.errors.clear()  # their tracebacks refer to this frame
    return cast("list[R]", work.results)


class _WorkQueue(Generic[T, R]):
    """Work items that several threads take in turn; its shared state changes atomically."""

    def __init__(self, act: Callable[[T], R], items: Sequence[T]) -> None:
        self.results: list[R | None] = [None] * len(items)
        self.errors: list[BaseException] = []
        self._shielded_call = shielded.current()
        self._is_stopped = False  # no further items are taken
        self._act = act
        self._items = items
        self._indices = iter(range(len(items)))
        self._is_exhausted = not items
        self._running: set[int] = set()  # the ids of the started threads that are at work
        self._wake_up = _thread.allocate_lock()  # released when a started thread ends
        self._wake_up.acquire()

    def run_worker(self) -> None:
        """Run items in a started thread."""
        own = _thread.get_ident()
        try:
            self._running.add(own)
            self.run()
        except MemoryError as error:
            self.stop(error)
        finally:
            self._running.discard(own)
            with contextlib.suppress(RuntimeError):  # another thread has released it
                self._wake_up.release()

    def run(self) -> None:
        """Run items until none is left."""
        try:
            while not self._is_stopped:
                if self._shielded_call is not None:
                    self._shielded_call.check()
                index = next(self._indices, None)
                if index is None:
                    self._is_exhausted = True
                    return
                self.results[index] = self._act(self._items[index])
        except BaseException as error:
            self.stop(error)

    def stop(self, error: BaseException) -> None:
        """Let no thread take another item."""
        self._is_stopped = True
        self.errors.append(error)

    @property
    def is_done(self) -> bool:
        """Whether no item is being run, or will be.

        The order matters: a thread that took an item before the last was taken was running then.
        """
        return (self._is_stopped or self._is_exhausted) and not self._running

    def wait(self) -> None:
        """Return when a started thread has ended, or after 0.1 s."""
        if not self._wake_up.acquire(timeout=0.1):
            alive = thread_frames.current_frames()
            for thread in [each for each in self._running if each not in alive]:
                self._running.discard(thread)  # it ran out of memory and could not report its end
                self.stop(MemoryError())


def _blocks(piece: Piece, nbytes: int = BLOCK_NBYTES) -> Iterator[tuple[int, int]]:
    starts = itertools.chain(range(0, piece.nbytes, nbytes), (piece.nbytes,))
    return itertools.pairwise(starts)


def _fill(descriptor: int, buffer: memoryview, offset: int, where: str) -> None:
    while buffer:
        count = file_system.active.read(descriptor, buffer, offset)
        if count <= 0:
            raise CheckpointDamagedError(
                f"{where}: expected {len(buffer)} more bytes at {offset}; the file ends there; it "
                f"has been truncated"
            )
        buffer = buffer[count:]
        offset += count
