"""Reader of one checkpoint: its validated manifest, and checksummed reads of its tensors."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from dvkernels.checkpoint.format import manifest, shards
from dvkernels.checkpoint.format.manifest import FileEntry, Manifest
from dvkernels.checkpoint.format.shards import ByteRange
from dvkernels.checkpoint.storage import atomic_folder, file_system, parallel_io
from dvkernels.checkpoint.storage.atomic_folder import MANIFEST
from dvkernels.checkpoint.storage.file_system import Folder
from dvkernels.checkpoint.storage.parallel_io import Piece
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.user_errors import brief

__all__: list[str] = []

_PROCESS_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_MAX_REPLACEMENTS = 100  # each of them a whole save while the reader opens the files


class CheckpointReader:
    """Open checkpoint; replacing or removing it meanwhile does not affect the reader."""

    def __init__(self, path: Path, folder: Folder) -> None:
        self.path = path
        self._descriptors: list[int] = []
        try:
            content = _read_manifest(folder)
            self.checksum = parallel_io.checksum(content)  # of the manifest
            self.manifest = manifest.read(content, str(path / MANIFEST))
            self._ranges: dict[str, ByteRange] = {}
            for entry in self.manifest.files:
                descriptor = file_system.active.open(folder / entry.name)
                self._descriptors.append(descriptor)
                self._ranges |= _byte_ranges(descriptor, entry, f"{path / entry.name}")
            _check_tensors(self.manifest, self._ranges, path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files; may be called twice."""
        while self._descriptors:
            file_system.active.close(self._descriptors.pop())

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # an interrupt may have ended __init__ early
            self.close()

    def check(self, names: Iterable[str]) -> None:
        """Read tensors and compare their checksums, without keeping the data."""
        with _readable(self.path):
            parallel_io.load([piece for name in names for piece in self._pieces(name, ())])

    def prepare_load(self, targets: Mapping[str, Iterable[HostArray]]) -> Callable[[], None]:
        """Return a function that reads tensors, each into all its targets, and compares checksums.

        The function needs hardly any new memory.
        """
        pieces = [piece for name, arrays in targets.items() for piece in self._pieces(name, arrays)]

        def load() -> None:
            with _readable(self.path):
                parallel_io.load(pieces)

        return load

    def _pieces(self, name: str, targets: Iterable[HostArray]) -> Iterator[Piece]:
        entry = self.manifest.tensors[name]
        where = f"{self.path / self.manifest.files[entry.file].name}, tensor {brief(name, 200)}"
        buffers = [parallel_io.bytes_of(target) for target in targets]
        for checksum, (begin, end) in zip(
            entry.checksums, parallel_io.cut(entry.nbytes), strict=True
        ):
            yield Piece(
                self._descriptors[entry.file],
                self._ranges[name].begin + begin,
                tuple(buffer[begin:end] for buffer in buffers),
                end - begin,
                checksum,
                where,
            )


def open_reader(path: Path) -> CheckpointReader:
    """Open a checkpoint, which the caller closes; raise CheckpointDamagedError if unreadable.

    A concurrent writer may replace the checkpoint before all its files are open. Then the new one
    is opened.
    """
    with _readable(path):
        for is_last in (*[False] * _MAX_REPLACEMENTS, True):
            try:
                folder = atomic_folder.open_existing(path)
            except FileNotFoundError:
                raise _missing_error(path) from None
            try:
                return CheckpointReader(path, folder)
            except (OSError, CheckpointDamagedError):
                if is_last or not _is_replaced(path, folder):
                    raise
            finally:
                file_system.active.close(folder.descriptor)
    raise AssertionError("unreachable")


def _is_replaced(path: Path, folder: Folder) -> bool:
    """Return whether ``path`` now names another folder than the open one."""
    try:
        current = atomic_folder.open_existing(path)
    except OSError:
        return False
    try:
        return not os.path.sameopenfile(current.descriptor, folder.descriptor)
    finally:
        file_system.active.close(current.descriptor)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError) as error:
        # A process that runs out of memory or descriptors says nothing about the files.
        is_limit = isinstance(error, MemoryError) or error.errno in _PROCESS_LIMITS
        kind = CheckpointError if is_limit else CheckpointDamagedError
        reason = str(error) or "there is not enough memory"
        raise kind(f"{path} cannot be read: {reason}") from error


def _missing_error(path: Path) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"{path}: expected a checkpoint, a folder with {MANIFEST}; there is none"
    )


def _read_manifest(folder: Folder) -> bytes:
    entry = folder / MANIFEST
    try:
        descriptor = file_system.active.open(entry)
    except FileNotFoundError:
        raise _missing_error(folder.path) from None
    try:
        nbytes = file_system.active.size(descriptor)
        if nbytes > manifest.MAX_NBYTES:
            raise CheckpointDamagedError(
                f"{entry}: expected at most {manifest.MAX_NBYTES} bytes; it has {nbytes}"
            )
        return parallel_io.read_all(descriptor, nbytes, 0, str(entry))
    finally:
        file_system.active.close(descriptor)


def _byte_ranges(descriptor: int, entry: FileEntry, where: str) -> dict[str, ByteRange]:
    """Return the byte range of each tensor of a shard."""
    nbytes = file_system.active.size(descriptor)
    if nbytes != entry.nbytes or nbytes < 8:
        raise CheckpointDamagedError(
            f"{where}: expected {entry.nbytes} bytes, as the manifest says; it has {nbytes}; it "
            f"has been truncated or replaced"
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


def _check_tensors(given: Manifest, ranges: dict[str, ByteRange], path: Path) -> None:
    """Raise unless the shards hold the tensors of the manifest."""
    if ranges.keys() != given.tensors.keys():
        name = next(iter(ranges.keys() ^ given.tensors.keys()))
        raise CheckpointDamagedError(
            f"{path}: tensor {brief(name, 200)} is in the manifest or in a shard, and not in both"
        )
    for name, entry in given.tensors.items():
        found = ranges[name]
        expected = shards.safetensors_spec(entry.dtype, entry.shape)
        if found.spec != expected or found.end - found.begin != entry.nbytes:
            raise CheckpointDamagedError(
                f"{path / given.files[entry.file].name}, tensor {brief(name, 200)}: expected "
                f"{expected} in {entry.nbytes} bytes, as the manifest says; got {found}"
            )
