"""One save on its way: from a snapshot to the files of a folder, by all workers together."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dvkernels.checkpoint import all_or_none
from dvkernels.checkpoint.format import manifest, shards
from dvkernels.checkpoint.format.manifest import FileEntry, Manifest, TensorEntry
from dvkernels.checkpoint.saving import snapshot
from dvkernels.checkpoint.saving.snapshot import Snapshot
from dvkernels.checkpoint.storage import atomic_folder, files, parallel_io
from dvkernels.checkpoint.storage.files import Folder
from dvkernels.checkpoint.storage.parallel_io import Piece
from dvkernels.devices import cpu
from dvkernels.errors import CheckpointError
from dvkernels.profiler import tracing
from dvkernels.threads.shielded import uninterrupted

__all__: list[str] = []

# Smaller shards gain nothing from a core of their own.
_LEAST_SHARD_NBYTES = 32 << 20


class _Written(NamedTuple):
    """What a worker has written: its shards, in order, and what lies in them."""

    files: list[FileEntry]
    tensors: dict[str, TensorEntry]


def prepared(
    objects: Mapping[str, Any],
    step: int | None,
    metadata: Any,
    path: Path,
    door: Callable[[], AbstractContextManager[None]],
) -> Save:
    """Return a save of what objects hold now; raise if one of them cannot be saved."""
    try:
        return Save(snapshot.take(objects, step, metadata), path, door)
    except MemoryError as error:
        raise CheckpointError(
            f"save to {path}: there is not enough memory for what is to be saved"
        ) from error


class Save:
    """Three steps, in this order; after an error what was at ``path`` before is there still.

    Every worker takes them; :meth:`begin` and :meth:`finish` bring all of them together.

    Parameters
    ----------
    taken : Snapshot
    path : Path
    door : callable
        Returns a context in which nobody else writes there, and at whose end what was written is
        put in place. Entered by the chief.
    """

    def __init__(
        self, taken: Snapshot, path: Path, door: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.snapshot = taken
        self.workers = taken.workers
        self._path = path
        self._door = door
        self._what = f"save to {path}"
        self._is_chief = self.workers.rank == all_or_none.CHIEF
        self._stack = ExitStack()
        self._groups = _dealt(taken.tensors)
        self._block_nbytes = parallel_io.BLOCK_NBYTES
        self._first_shard = 0
        self._written: _Written | None = None
        self._failure: BaseException | None = None
        self._is_undone = False

    def copied(self, copied: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        """Save copies of the arrays, as ``copied`` returns them, instead of themselves."""
        # Who writes beside the run asks for the interpreter's lock as seldom as possible: a replica
        # that needs it waits for a writer that has it, and may wait for a core. Steps took 1.1
        # times as long as alone with whole pieces, 1.2 to 1.3 times with blocks for the caches.
        self._block_nbytes = parallel_io.PIECE_NBYTES
        with naming_failures(self._path):
            tensors = copied(self.snapshot.tensors)
        self.snapshot = replace(self.snapshot, tensors=tensors)
        self._groups = _dealt(tensors)

    def carry_out(self) -> None:
        """Take the three steps, or undo them."""
        try:
            self.begin()
            uninterrupted(self.write)
            self.finish()
        except BaseException as error:
            self.abort(error)
            raise

    def begin(self) -> None:
        """Make the place to write to, and agree on the numbers of the shards."""
        with all_or_none.telling(self.workers, self._what):
            if self._is_chief:
                uninterrupted(self._open, is_atomic=True)
            counts = self.workers.exchange(len(self._groups))
        self._first_shard = sum(counts[: self.workers.rank])

    @tracing.span("write", "checkpoint")
    def write(self) -> None:
        """Write the shards of this worker; :meth:`finish` says if that has failed."""
        try:
            with naming_failures(self._path), atomic_folder.unfinished(self._path) as new:
                self._written = _write_shards(
                    self._groups, new, self._first_shard, self._block_nbytes
                )
        except BaseException as error:
            self._failure = error

    def finish(self) -> None:
        """Put all in place when every worker has written its shards, or raise on all of them."""
        parts: list[_Written] = all_or_none.together(self.workers, self._what, self._own_part)
        with all_or_none.telling(self.workers, self._what):
            if self._is_chief:
                uninterrupted(lambda: self._close(parts), is_atomic=True)
            self.workers.meet()

    def abort(self, error: BaseException) -> None:
        """Undo what has been done, and let the other workers know; may be called twice."""
        if not self._is_undone:
            self.workers.announce(error)
            uninterrupted(lambda: self._undo(error), is_atomic=True)
            self._is_undone = True

    def _open(self) -> None:
        with naming_failures(self._path):
            self._stack.enter_context(self._door())

    def _close(self, parts: Sequence[_Written]) -> None:
        with naming_failures(self._path):
            _write_manifest(self.snapshot, parts, self._path)
            self._stack.close()

    def _own_part(self) -> _Written:
        failure, self._failure = self._failure, None  # it holds what was on the stack
        if failure is not None:
            raise failure
        assert self._written is not None
        return self._written

    def _undo(self, error: BaseException) -> None:
        # The error is raised by who has called; the contexts raise it too.
        with contextlib.suppress(BaseException):
            self._stack.__exit__(type(error), error, error.__traceback__)


@contextlib.contextmanager
def naming_failures(path: Path) -> Iterator[None]:
    """Say of an error of the operating system what it has kept from being saved."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise CheckpointError(
            f"save to {path} failed: {str(error) or 'there is not enough memory'}; what was there "
            f"before is whole, and the run can go on"
        ) from error


def _write_shards(
    groups: Sequence[Sequence[tuple[str, Any]]], new: Folder, first_shard: int, block_nbytes: int
) -> _Written:
    with contextlib.ExitStack() as stack:
        descriptors, headers, columns = [], [], []
        for place, group in enumerate(groups, first_shard):
            descriptor = files.active.create(new / manifest.shard_name(place))
            stack.callback(files.active.close, descriptor)
            tensors = [(name, array.dtype.name, array.shape) for name, array in group]
            header = shards.header(tensors)
            parallel_io.write_all(descriptor, header, 0)
            descriptors.append(descriptor)
            headers.append(header)
            columns.append(_pieces(descriptor, len(header), group))
        # In turn, so that the cores are at work in different files: a file takes one at a time.
        pieces = [
            piece for row in itertools.zip_longest(*columns) for piece in row if piece is not None
        ]
        written = zip(pieces, parallel_io.write(pieces, block_nbytes), strict=True)
        checksums: dict[str, list[tuple[int, str]]] = {}
        for piece, checksum in written:
            checksums.setdefault(piece.where, []).append((piece.offset, checksum))
        parallel_io.in_parallel(files.active.sync, descriptors)
    entries = [
        FileEntry(
            manifest.shard_name(place),
            len(header) + sum(array.nbytes for _, array in group),
            parallel_io.checksum(header),
        )
        for place, (header, group) in enumerate(zip(headers, groups, strict=True), first_shard)
    ]
    tensors_of = {
        name: TensorEntry(
            place,
            array.dtype.name,
            array.shape,
            tuple(checksum for _, checksum in sorted(checksums.get(name, []))),
        )
        for place, group in enumerate(groups, first_shard)
        for name, array in group
    }
    return _Written(entries, tensors_of)


def _write_manifest(taken: Snapshot, parts: Sequence[_Written], path: Path) -> None:
    content = manifest.write(
        Manifest(
            taken.step,
            tuple(entry for part in parts for entry in part.files),
            {name: entry for part in parts for name, entry in part.tensors.items()},
            taken.objects,
            taken.metadata,
        )
    )
    with atomic_folder.unfinished(path) as new:
        descriptor = files.active.create(new / atomic_folder.MANIFEST)
        try:
            parallel_io.write_all(descriptor, content, 0)
            files.active.sync(descriptor)
        finally:
            files.active.close(descriptor)


def _dealt(tensors: Mapping[str, Any]) -> list[list[tuple[str, Any]]]:
    """Deal the tensors to shards of about one size."""
    total = sum(array.nbytes for array in tensors.values())
    most = max(1, min(cpu.usable_cores(), math.ceil(total / _LEAST_SHARD_NBYTES)))
    sizes = {name: array.nbytes for name, array in tensors.items()}
    groups = [
        [(name, tensors[name]) for name in names]
        for names in shards.dealt(sizes, min(most, len(tensors)))
    ]
    # Wide elements first: then each tensor begins at a multiple of its element's size.
    return [sorted(group, key=lambda item: -item[1].dtype.itemsize) for group in groups]


def _pieces(descriptor: int, begin: int, group: Sequence[tuple[str, Any]]) -> list[Piece]:
    pieces = []
    for name, array in group:
        data = parallel_io.bytes_of(array)
        for start, stop in parallel_io.cut(array.nbytes):
            place = (data[start:stop],)
            pieces.append(Piece(descriptor, begin + start, place, stop - start, "", name))
        begin += array.nbytes
    return pieces
