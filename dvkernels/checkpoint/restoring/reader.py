"""A checkpoint that is open to read: its manifest checked, and each tensor's place known."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvkernels.checkpoint.format import manifest, shards
from dvkernels.checkpoint.format.manifest import FileEntry, Manifest
from dvkernels.checkpoint.format.shards import ByteRange
from dvkernels.checkpoint.storage import atomic_folder as folder
from dvkernels.checkpoint.storage import files, parallel_io
from dvkernels.checkpoint.storage.atomic_folder import MANIFEST
from dvkernels.checkpoint.storage.files import Folder
from dvkernels.checkpoint.storage.parallel_io import Piece
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.user_errors import shown

__all__: list[str] = []

_OF_THE_PROCESS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_MOST_REPLACEMENTS = 100  # each of them a whole save, between two looks at the folder


class CheckpointReader:
    """The content of a checkpoint; who replaces or removes it meanwhile changes nothing in here."""

    def __init__(self, path: Path, folder: Folder) -> None:
        self.path = path
        self._descriptors: list[int] = []
        try:
            content = _manifest(folder)
            self.checksum = parallel_io.checksum(content)  # of the manifest
            self.manifest = manifest.read(content, str(path / MANIFEST))
            self._ranges: dict[str, ByteRange] = {}
            for entry in self.manifest.files:
                descriptor = files.active.open(folder / entry.name)
                self._descriptors.append(descriptor)
                self._ranges |= _ranges(descriptor, entry, f"{path / entry.name}")
            _compare(self.manifest, self._ranges, path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files; may be called twice."""
        while self._descriptors:
            files.active.close(self._descriptors.pop())

    __del__ = close  # an interrupt may keep anybody from calling it

    def check(self, names: Iterable[str]) -> None:
        """Read tensors and compare their checksums."""
        with _readable(self.path):
            parallel_io.check([piece for name in names for piece in self._pieces(name, ())])

    def load(self, places: Mapping[str, Iterable[Any]]) -> None:
        """Read tensors, each into all its arrays, and compare their checksums."""
        self.loading(places)()

    def loading(self, places: Mapping[str, Iterable[Any]]) -> Callable[[], None]:
        """Return what does :meth:`load`, and needs hardly any memory to do it."""
        pieces = [piece for name, given in places.items() for piece in self._pieces(name, given)]

        def load() -> None:
            with _readable(self.path):
                parallel_io.load(pieces)

        return load

    def _pieces(self, name: str, places: Iterable[Any]) -> Iterator[Piece]:
        entry = self.manifest.tensors[name]
        where = f"{self.path / self.manifest.files[entry.file].name}, tensor {shown(name, 200)}"
        held = [parallel_io.bytes_of(place) for place in places]
        for checksum, (begin, end) in zip(
            entry.checksums, parallel_io.cut(entry.nbytes), strict=True
        ):
            yield Piece(
                self._descriptors[entry.file],
                self._ranges[name].begin + begin,
                tuple(place[begin:end] for place in held),
                end - begin,
                checksum,
                where,
            )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[CheckpointReader]:
    """Have a checkpoint open; :class:`CheckpointDamagedError` if it cannot be read."""
    reader = open_reader(path)
    try:
        yield reader
    finally:
        reader.close()


def open_reader(path: Path) -> CheckpointReader:
    """Open a checkpoint; :class:`CheckpointDamagedError` if it cannot be read.

    A writer beside it may remove the one that was found before all its files are open. Then what
    has taken its place is opened.
    """
    with _readable(path):
        for is_last in (*[False] * _MOST_REPLACEMENTS, True):
            try:
                found = folder.open_existing(path)
            except FileNotFoundError:
                raise _absent(path) from None
            try:
                return CheckpointReader(path, found)
            except (OSError, CheckpointDamagedError):
                if is_last or not _is_replaced(path, found):
                    raise
            finally:
                files.active.close(found.descriptor)
    raise AssertionError("unreachable")


def _is_replaced(path: Path, found: Folder) -> bool:
    """Say whether another folder has taken the place of an open one."""
    try:
        now = folder.open_existing(path)
    except OSError:
        return False
    try:
        return not os.path.sameopenfile(now.descriptor, found.descriptor)
    finally:
        files.active.close(now.descriptor)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError) as error:
        # Where the process has too little of something, the files are not to blame.
        is_ours = isinstance(error, MemoryError) or error.errno in _OF_THE_PROCESS
        kind = CheckpointError if is_ours else CheckpointDamagedError
        why = str(error) or "there is not enough memory"
        raise kind(f"{path} cannot be read: {why}") from error


def _absent(path: Path) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"{path}: expected a checkpoint, a folder with {MANIFEST}; there is none"
    )


def _manifest(given: Folder) -> bytes:
    where = given / MANIFEST
    try:
        descriptor = files.active.open(where)
    except FileNotFoundError:
        raise _absent(given.path) from None
    try:
        nbytes = files.active.size(descriptor)
        if nbytes > manifest.MAX_NBYTES:
            raise CheckpointDamagedError(
                f"{where}: expected at most {manifest.MAX_NBYTES} bytes; it has {nbytes}"
            )
        return parallel_io.read_all(descriptor, nbytes, 0, str(where))
    finally:
        files.active.close(descriptor)


def _ranges(descriptor: int, entry: FileEntry, where: str) -> dict[str, ByteRange]:
    """Return where the tensors of a shard lie."""
    nbytes = files.active.size(descriptor)
    if nbytes != entry.nbytes or nbytes < 8:
        raise CheckpointDamagedError(
            f"{where}: expected {entry.nbytes} bytes, as the manifest says; it has {nbytes}; it "
            f"has been cut off or exchanged"
        )
    first = parallel_io.read_all(descriptor, 8, 0, where)
    length = shards.header_nbytes(first, nbytes, where)
    header = parallel_io.read_all(descriptor, length, 0, where)
    if parallel_io.checksum(header) != entry.header:
        raise CheckpointDamagedError(
            f"{where}: the checksum of its header is not the one in the manifest; it is damaged, "
            f"or belongs to another checkpoint"
        )
    return shards.read_header(header, nbytes, where)


def _compare(given: Manifest, ranges: dict[str, ByteRange], path: Path) -> None:
    """Raise unless shards and manifest speak of the same tensors."""
    if ranges.keys() != given.tensors.keys():
        name = next(iter(ranges.keys() ^ given.tensors.keys()))
        raise CheckpointDamagedError(
            f"{path}: tensor {shown(name, 200)} stands in the manifest or in a shard, "
            "and not in both"
        )
    for name, entry in given.tensors.items():
        held = ranges[name]
        expected = shards.stored(entry.dtype, entry.shape)
        if held.stored != expected or held.end - held.begin != entry.nbytes:
            raise CheckpointDamagedError(
                f"{path / given.files[entry.file].name}, tensor {shown(name, 200)}: expected "
                f"{expected} in {entry.nbytes} bytes, as the manifest says; got {held}"
            )
