"""A checkpoint that is open to read: its manifest checked, and each tensor's place known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvkernels.checkpoint import files, folder, manifest, shards, transfer
from dvkernels.checkpoint.manifest import FileEntry, Manifest
from dvkernels.checkpoint.shards import Range
from dvkernels.checkpoint.transfer import Piece
from dvkernels.errors import CheckpointDamagedError

__all__: list[str] = []


class Reader:
    """The content of a checkpoint. Made by :func:`opened`."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path = path
        content = _manifest(path)
        self.checksum = transfer.checksum(content)  # of the manifest
        self.manifest = manifest.read(content, str(path / folder.MANIFEST))
        self._descriptors: list[int] = []
        self._ranges: dict[str, Range] = {}
        for entry in self.manifest.files:
            descriptor = files.active.open(path / entry.name)
            stack.callback(files.active.close, descriptor)
            self._descriptors.append(descriptor)
            self._ranges |= _ranges(descriptor, entry, f"{path / entry.name}")
        _compare(self.manifest, self._ranges, path)

    def check(self, names: Iterable[str]) -> None:
        """Read tensors and compare their checksums."""
        with _readable(self.path):
            transfer.check([piece for name in names for piece in self._pieces(name, ())])

    def load(self, places: Mapping[str, Iterable[Any]]) -> None:
        """Read tensors, each into all its arrays, and compare their checksums."""
        with _readable(self.path):
            transfer.load(
                [piece for name, given in places.items() for piece in self._pieces(name, given)]
            )

    def _pieces(self, name: str, places: Iterable[Any]) -> Iterator[Piece]:
        entry = self.manifest.tensors[name]
        where = f"{self.path / self.manifest.files[entry.file].name}, tensor {name!r:.200}"
        held = [transfer.bytes_of(place) for place in places]
        for checksum, (begin, end) in zip(entry.checksums, transfer.cut(entry.nbytes), strict=True):
            yield Piece(
                self._descriptors[entry.file],
                self._ranges[name].begin + begin,
                tuple(place[begin:end] for place in held),
                end - begin,
                checksum,
                where,
            )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """Open a checkpoint; :class:`CheckpointDamagedError` if it cannot be read."""
    with contextlib.ExitStack() as stack:
        with _readable(path):
            reader = Reader(folder.existing(path), stack)
        yield reader


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error


def _manifest(path: Path) -> bytes:
    where = path / folder.MANIFEST
    try:
        descriptor = files.active.open(where)
    except FileNotFoundError:
        raise CheckpointDamagedError(
            f"{path}: expected a checkpoint, a folder with {folder.MANIFEST}; there is none"
        ) from None
    try:
        nbytes = files.active.size(descriptor)
        if nbytes > manifest.MAX_NBYTES:
            raise CheckpointDamagedError(
                f"{where}: expected at most {manifest.MAX_NBYTES} bytes; it has {nbytes}"
            )
        return transfer.read_all(descriptor, nbytes, 0, str(where))
    finally:
        files.active.close(descriptor)


def _ranges(descriptor: int, entry: FileEntry, where: str) -> dict[str, Range]:
    """Return where the tensors of a shard lie."""
    nbytes = files.active.size(descriptor)
    if nbytes != entry.nbytes or nbytes < 8:
        raise CheckpointDamagedError(
            f"{where}: expected {entry.nbytes} bytes, as the manifest says; it has {nbytes}; it "
            f"has been cut off or exchanged"
        )
    first = transfer.read_all(descriptor, 8, 0, where)
    length = shards.header_nbytes(first, nbytes, where)
    header = transfer.read_all(descriptor, length, 0, where)
    if transfer.checksum(header) != entry.header:
        raise CheckpointDamagedError(
            f"{where}: the checksum of its header is not the one in the manifest; it is damaged, "
            f"or belongs to another checkpoint"
        )
    return shards.read_header(header, nbytes, where)


def _compare(given: Manifest, ranges: dict[str, Range], path: Path) -> None:
    """Raise unless shards and manifest speak of the same tensors."""
    if ranges.keys() != given.tensors.keys():
        name = next(iter(ranges.keys() ^ given.tensors.keys()))
        raise CheckpointDamagedError(
            f"{path}: tensor {name!r:.200} stands in the manifest or in a shard, and not in both"
        )
    for name, entry in given.tensors.items():
        held = ranges[name]
        expected = shards.stored(entry.dtype, entry.shape)
        if held.stored != expected or held.end - held.begin != entry.nbytes:
            raise CheckpointDamagedError(
                f"{path / given.files[entry.file].name}, tensor {name!r:.200}: expected "
                f"{expected} in {entry.nbytes} bytes, as the manifest says; got {held}"
            )
