"""From objects to a folder: a snapshot of what they hold, then its files."""

from __future__ import annotations

import atexit
import contextlib
import copy
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dvkernels.checkpoint import files, folder, manifest, plain, shards, transfer
from dvkernels.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from dvkernels.checkpoint.nodes import Node
from dvkernels.checkpoint.objects import Gathered
from dvkernels.checkpoint.transfer import Piece
from dvkernels.devices import cpu, threads
from dvkernels.errors import CheckpointError
from dvkernels.profiler.debugging import LOGGER

__all__: list[str] = []

# Smaller shards gain nothing from a core of their own.
_LEAST_SHARD_NBYTES = 32 << 20


@dataclass(frozen=True)
class Snapshot:
    """What is to be saved. The arrays may be those of the objects themselves."""

    step: int | None
    metadata: Any
    objects: dict[str, Node]
    tensors: dict[str, Any]


def take(objects: Mapping[str, Any], step: int | None, metadata: Any) -> Snapshot:
    """Return what objects hold now, and raise if one of them cannot be saved."""
    shards.check_machine()
    given = {} if metadata is None else metadata
    if not isinstance(given, dict):
        raise CheckpointError(f"metadata: expected a dict; got {metadata!r:.80}")
    plain.encode(given, "metadata")
    gathered = Gathered(objects)
    return Snapshot(step, copy.deepcopy(given), gathered.nodes, gathered.tensors)


def write(snapshot: Snapshot, path: Path) -> None:
    """Write a checkpoint; after an error what was at ``path`` before is there still."""
    with naming_failures(path):
        folder.make_folders(path.parent)
        with folder.lock(path):
            write_locked(snapshot, path)


def write_locked(snapshot: Snapshot, path: Path) -> None:
    """Write a checkpoint where the caller has seen to it that nobody else does."""
    with folder.written(path) as new:
        _write_files(snapshot, new)


@contextlib.contextmanager
def naming_failures(path: Path) -> Iterator[None]:
    """Say of an error of the operating system what it has kept from being saved."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"save to {path} failed: {error}; what was there before is whole, and the run can go on"
        ) from error


def _write_files(snapshot: Snapshot, new: Path) -> None:
    groups = _dealt(snapshot.tensors)
    with contextlib.ExitStack() as stack:
        descriptors, headers, columns = [], [], []
        for place, group in enumerate(groups):
            descriptor = files.active.create(new / manifest.shard_name(place))
            stack.callback(files.active.close, descriptor)
            tensors = [(name, array.dtype.name, array.shape) for name, array in group]
            header = shards.header(tensors)
            transfer.write_all(descriptor, header, 0)
            descriptors.append(descriptor)
            headers.append(header)
            columns.append(_pieces(descriptor, len(header), group))
        # In turn, so that the cores are at work in different files: a file takes one at a time.
        pieces = [
            piece for row in itertools.zip_longest(*columns) for piece in row if piece is not None
        ]
        written = zip(pieces, transfer.write(pieces), strict=True)
        checksums: dict[str, list[tuple[int, str]]] = {}
        for piece, checksum in written:
            checksums.setdefault(piece.where, []).append((piece.offset, checksum))
        transfer.in_parallel(files.active.sync, descriptors)
    entries = tuple(
        FileEntry(
            manifest.shard_name(place),
            len(header) + sum(array.nbytes for _, array in group),
            transfer.checksum(header),
        )
        for place, (header, group) in enumerate(zip(headers, groups, strict=True))
    )
    tensors_of = {
        name: TensorEntry(
            place,
            array.dtype.name,
            array.shape,
            tuple(checksum for _, checksum in sorted(checksums.get(name, []))),
        )
        for place, group in enumerate(groups)
        for name, array in group
    }
    content = manifest.write(
        Manifest(snapshot.step, entries, tensors_of, snapshot.objects, snapshot.metadata)
    )
    descriptor = files.active.create(new / folder.MANIFEST)
    try:
        transfer.write_all(descriptor, content, 0)
        files.active.sync(descriptor)
    finally:
        files.active.close(descriptor)


def _dealt(tensors: Mapping[str, Any]) -> list[list[tuple[str, Any]]]:
    """Deal the tensors to shards of about one size: the largest first, each to the emptiest."""
    total = sum(array.nbytes for array in tensors.values())
    most = max(1, min(cpu.usable_cores(), math.ceil(total / _LEAST_SHARD_NBYTES)))
    groups: list[list[tuple[str, Any]]] = [[] for _ in range(min(most, len(tensors)))]
    fill = [0] * len(groups)
    for name, array in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        place = fill.index(min(fill))
        groups[place].append((name, array))
        fill[place] += array.nbytes
    # Wide elements first: then each tensor begins at a multiple of its element's size.
    return [sorted(group, key=lambda item: -item[1].dtype.itemsize) for group in groups]


def _pieces(descriptor: int, begin: int, group: Sequence[tuple[str, Any]]) -> list[Piece]:
    pieces = []
    for name, array in group:
        data = transfer.bytes_of(array)
        for start, stop in transfer.cut(array.nbytes):
            place = (data[start:stop],)
            pieces.append(Piece(descriptor, begin + start, place, stop - start, "", name))
        begin += array.nbytes
    return pieces


class Saver:
    """Writes snapshots one after another: while the caller waits, or in the background."""

    def __init__(self) -> None:
        # Where snapshots are copied to, kept from save to save: the operating system would have to
        # find new memory each time, which takes longer than the copy.
        self._host: dict[str, Any] = {}
        # Not the thread: up to Python 3.12 an interrupted join takes it for ended.
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._failure: list[BaseException] = []

    def save(
        self,
        snapshot: Callable[[], Snapshot],
        write_out: Callable[[Snapshot], None],
        *,
        background: bool,
    ) -> None:
        """Take a snapshot and write it; first wait for the one before, and raise its error."""
        self.wait()
        taken = snapshot()
        if not background:
            write_out(taken)
            return
        copied = replace(taken, tensors=self._copied(taken.tensors))

        def work() -> None:
            try:
                _step_back()
                write_out(copied)
                _unsettled.discard(self)
            except BaseException as error:
                self._failure.append(error)
                LOGGER.error("a save in the background failed: %s", error)
            finally:
                self._is_idle.set()

        _unsettled.add(self)
        self._is_idle.clear()
        try:
            # Not a daemon: the interpreter waits for it before it ends.
            threads.start([threading.Thread(target=work, name="dvkernels-checkpoint")])
        except RuntimeError:
            self.forget()
            raise

    def wait(self) -> None:
        """Return when nothing is being written; raise what went wrong since the last call."""
        self._is_idle.wait()
        if self._failure:
            _unsettled.discard(self)
            raise self._failure.pop()

    @property
    def is_busy(self) -> bool:
        """Whether something is being written in the background."""
        return not self._is_idle.is_set()

    def forget(self) -> None:
        """Take it that nobody writes: a child has no thread that does."""
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._failure = []
        _unsettled.discard(self)

    def _copied(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of arrays."""
        held = self._host
        self._host = {}
        for name, array in tensors.items():
            own = held.get(name)
            if own is None or own.shape != array.shape or own.dtype != array.dtype:
                own = np.empty(array.shape, array.dtype)
            self._host[name] = own
        transfer.copy([(self._host[name], array) for name, array in tensors.items()])
        return self._host


def _step_back() -> None:
    """Run only where nobody else wants to; threads that this thread starts do likewise.

    Steps that kept two cores busy took five times as long while 1 GiB was written at the usual
    priority, 1.5 times at the lowest, and as long as otherwise under ``SCHED_IDLE``. The save then
    took 7 s in place of 1.3 there; who waits for it frees a core, and it goes on at full speed.
    """
    if sys.platform == "linux":  # elsewhere a priority is that of the whole process
        own = threading.get_native_id()
        try:
            os.sched_setscheduler(own, os.SCHED_IDLE, os.sched_param(0))
        except OSError:  # a sandbox may forbid it
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, own, 19)


# Those that write, or have failed and not said so.
_unsettled: set[Saver] = set()


@atexit.register
def _finish() -> None:
    """At the end of the program: wait, and say what nobody has asked for."""
    for saver in list(_unsettled):
        try:
            saver.wait()
        except BaseException as error:
            print(f"dvkernels: a save in the background failed: {error}", file=sys.stderr)


def _forget() -> None:
    for saver in list(_unsettled):
        saver.forget()


os.register_at_fork(after_in_child=_forget)
