"""Atomic creation and replacement of a checkpoint folder.

A checkpoint ``NAME`` has these companions in its parent folder:

* ``.tmp-NAME``: the staging folder; after a save that was killed, a leftover.
* ``.old-NAME``: the previous checkpoint, always whole; valid while ``NAME`` is missing.
* ``.lock-NAME``: locked during a save.
* ``.ends-OTHER-with-NAME``: a tombstone: once ``NAME`` exists, ``OTHER`` is no longer valid.

Only the files of a checkpoint are ever removed from a folder. A symbolic link is itself removed
or refused; its target is never touched.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dvkernels.checkpoint.storage import file_system
from dvkernels.checkpoint.storage.file_system import Entry, Folder
from dvkernels.checkpoint.storage.folder_lock import FolderLock
from dvkernels.errors import CheckpointError
from dvkernels.user_errors import brief

__all__: list[str] = []

MANIFEST = "manifest.json"
SHARD = re.compile(r"shard-[0-9]{5}\.safetensors")
_TOMBSTONE = re.compile(r"\.ends-(.+)-with-(.+)")


def absolute_path(path: str | os.PathLike[str], verb: str) -> Path:
    """Return a user's path as an absolute one; raise if no folder can have it."""
    try:
        text = os.fsdecode(path)
        os.fsencode(text)
        absolute = os.path.abspath(text)
    except TypeError:
        raise CheckpointError(
            f"{verb}: expected a path; got {brief(path)}, a {type(path).__name__}"
        ) from None
    except UnicodeError:
        raise CheckpointError(f"{verb}: no file can have the name {brief(path)}") from None
    except OSError as error:
        raise CheckpointError(
            f"{verb}: {brief(path)} is relative to the working directory, which cannot be found "
            f"({error}); give an absolute path"
        ) from error
    if "\0" in absolute:
        raise CheckpointError(f"{verb}: no file can have the name {brief(path)}")
    if absolute == os.path.sep:
        raise CheckpointError(f"{verb}: expected a folder below {absolute}; got {brief(path)}")
    return Path(absolute)


@contextlib.contextmanager
def opened(where: Path | Entry) -> Iterator[Folder]:
    """Open a folder, and close it at the end: at a user's path links are followed, else refused."""
    files = file_system.active
    folder = files.open_folder(where) if isinstance(where, Path) else files.enter(where)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # nothing was written through this descriptor
            files.close(folder.descriptor)


@contextlib.contextmanager
def locked_replacement(path: Path) -> Iterator[None]:
    """Lock ``path`` and replace it by :func:`replacement`; create its parent folders."""
    make_folders(path.parent)
    with (
        opened(path.parent) as parent,
        FolderLock(parent / f".lock-{path.name}", f"save to {path}"),
        replacement(parent / path.name),
    ):
        yield


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Folder]:
    """Open the staging folder of ``path``, to write files into."""
    with opened(path.parent) as parent, opened(_companion(parent / path.name, "tmp")) as folder:
        yield folder


@contextlib.contextmanager
def replacement(target: Entry, superseded: Iterable[Entry] = ()) -> Iterator[None]:
    """Create the staging folder of ``target``; at the end rename it to ``target``, atomically.

    The same renaming invalidates the ``superseded`` checkpoints: :func:`within` no longer lists
    them, and :func:`remove_superseded` removes them. The caller holds a lock and has synced the
    files. After an error the previous checkpoint is in place and nothing else is left. After a
    kill the next call recovers.
    """
    tmp, old, pid = _companion(target, "tmp"), _companion(target, "old"), os.getpid()
    _check_replaceable(target)
    _recover(target)
    file_system.active.make_folder(tmp)
    is_placed = False
    try:
        yield
        with opened(tmp) as folder:
            file_system.active.sync_folder(folder)
        if file_system.active.kind(target) == "folder":
            file_system.active.rename(target, old)
        tombstones = [_tombstone(target, other) for other in superseded]
        for tombstone in tombstones:  # while the target is missing, so that renaming activates them
            file_system.active.close(file_system.active.create(tombstone))
        if tombstones:
            file_system.active.sync_folder(target.folder)
        file_system.active.rename(tmp, target)
        is_placed = True
        file_system.active.sync_folder(target.folder)
    except BaseException:
        if os.getpid() != pid:  # a forked child exits; the save belongs to its parent
            raise
        # The next save completes a recovery that fails now.
        with contextlib.suppress(OSError, CheckpointError):
            if is_placed:
                file_system.active.rename(target, tmp)
            _recover(target)
        raise
    with contextlib.suppress(OSError, CheckpointError):
        _remove_old(target)


def discard(target: Entry) -> None:
    """Remove a checkpoint: it is renamed first, so that it is never seen with some files gone."""
    _check_own(target, "removing it")
    tmp = _companion(target, "tmp")
    _remove(tmp)
    file_system.active.rename(target, tmp)
    _remove(tmp)


def remove_leftovers(parent: Folder, pattern: re.Pattern[str]) -> None:
    """Recover the checkpoints whose names match after saves that were killed."""
    for name in file_system.active.names(parent):
        kind, _, rest = name.partition("-")
        if kind in (".tmp", ".old") and pattern.fullmatch(rest):
            _recover(parent / rest)
    remove_superseded(parent, pattern)


def remove_superseded(parent: Folder, pattern: re.Pattern[str]) -> None:
    """Remove the checkpoints whose tombstones are active, and the tombstones."""
    for found in _tombstones(file_system.active.names(parent)):
        if not all(map(pattern.fullmatch, found.groups())):
            continue
        superseded, successor = (parent / each for each in found.groups())
        if file_system.active.kind(successor) is not None:
            _recover(superseded)
            if file_system.active.kind(superseded) is not None:
                discard(superseded)
            file_system.active.sync_folder(parent)  # before the tombstone is removed
        file_system.active.remove(parent / found[0])


def within(parent: Path, pattern: re.Pattern[str]) -> list[Path]:
    """List the valid checkpoints in a folder whose names match, sorted by name."""
    try:
        with opened(parent) as folder:
            names = set(file_system.active.names(folder))
    except FileNotFoundError:
        return []
    superseded = {found[1] for found in _tombstones(names) if found[2] in names}
    # During a replacement, and after one that was killed, a checkpoint has its old name only.
    valid = {name.removeprefix(".old-") for name in names} - superseded
    return sorted(parent / name for name in valid if pattern.fullmatch(name))


def open_existing(path: Path) -> Folder:
    """Open a checkpoint, under its old name while it is being replaced."""
    for _ in range(3):  # it may be renamed after the first try, and removed before the second
        with contextlib.suppress(FileNotFoundError):
            return file_system.active.open_folder(path)
        with contextlib.suppress(FileNotFoundError), opened(path.parent) as parent:
            return file_system.active.enter(_companion(parent / path.name, "old"))
    return file_system.active.open_folder(path)


def make_folders(path: Path) -> None:
    """Create a folder and its parents where they are missing."""
    with contextlib.suppress(FileNotFoundError), opened(path):
        return
    make_folders(path.parent)
    with opened(path.parent) as parent:
        with contextlib.suppress(FileExistsError):  # another process has created it meanwhile
            file_system.active.make_folder(parent / path.name)
        file_system.active.sync_folder(parent)


def _companion(target: Entry, kind: str) -> Entry:
    return target.folder / f".{kind}-{target.name}"


def _tombstone(target: Entry, superseded: Entry) -> Entry:
    return target.folder / f".ends-{superseded.name}-with-{target.name}"


def _recover(target: Entry) -> None:
    """Restore the previous checkpoint after a save that did not complete; remove its leftovers."""
    _check_own(_companion(target, "old"), "removing it")
    _remove(_companion(target, "tmp"))
    if file_system.active.kind(target) is None:
        names = file_system.active.names(target.folder)
        tombstones = [found for found in _tombstones(names) if found[2] == target.name]
        for tombstone in tombstones:  # first: the previous checkpoint supersedes nothing
            file_system.active.remove(target.folder / tombstone[0])
        if tombstones:
            file_system.active.sync_folder(target.folder)
        old = _companion(target, "old")
        if file_system.active.kind(old) == "folder":
            file_system.active.rename(old, target)
    file_system.active.sync_folder(target.folder)
    _remove_old(target)


def _tombstones(names: Iterable[str]) -> list[re.Match[str]]:
    return [found for found in map(_TOMBSTONE.fullmatch, names) if found is not None]


def _remove_old(target: Entry) -> None:
    old, tmp = _companion(target, "old"), _companion(target, "tmp")
    match file_system.active.kind(old):
        case "link":  # this package creates no links
            file_system.active.remove(old)
        case "folder" if file_system.active.kind(target) == "folder":
            # Renamed first: a folder with the old name is always whole.
            file_system.active.rename(old, tmp)
            _remove(tmp)


def _remove(entry: Entry) -> None:
    """Remove a checkpoint folder and its files; of a link, the link only."""
    match file_system.active.kind(entry):
        case "link":
            file_system.active.remove(entry)
        case "folder":
            _check_own(entry, "removing it")
            with opened(entry) as folder:
                for name in file_system.active.names(folder):
                    file_system.active.remove(folder / name)
            file_system.active.remove_folder(entry)


def _check_replaceable(target: Entry) -> None:
    """Raise if the target is anything but a checkpoint."""
    match file_system.active.kind(target):
        case "link":
            raise CheckpointError(
                f"save to {target}: it is a link, which a save would replace; give the path that "
                f"it leads to, or remove it first"
            )
        case "other":
            raise CheckpointError(
                f"save to {target}: there is a file; choose another path, or remove it first"
            )
    _check_own(target, f"save to {target}")


def _check_own(entry: Entry, what: str) -> None:
    """Raise if a folder holds anything but the files of a checkpoint."""
    if file_system.active.kind(entry) != "folder":
        return
    with opened(entry) as folder:
        names = file_system.active.names(folder)
    foreign = [name for name in names if name != MANIFEST and not SHARD.fullmatch(name)]
    if foreign:
        raise CheckpointError(
            f"{what}: {entry} is a folder that holds {foreign[0]!r}, which is no part of a "
            f"checkpoint and would be removed; choose another path, or remove that file first"
        )
