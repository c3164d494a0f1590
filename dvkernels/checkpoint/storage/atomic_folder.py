"""A folder that appears whole or not at all, and is replaced likewise.

These names stand for a checkpoint at ``NAME``, all beside it:

* ``.tmp-NAME``: being written, or left behind by a save that was killed: litter.
* ``.old-NAME``: the one before, always whole; it counts where ``NAME`` is missing.
* ``.lock-NAME``: locked while somebody writes.
* ``.ends-OTHER-with-NAME``: where ``NAME`` is there, ``OTHER`` counts no more.

Only what is in a checkpoint is ever removed from a folder. A link is removed itself or refused,
and what it leads to is left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dvkernels.checkpoint.storage import files
from dvkernels.checkpoint.storage.files import Entry, Folder
from dvkernels.checkpoint.storage.folder_lock import FolderLock
from dvkernels.errors import CheckpointError
from dvkernels.user_errors import shown

__all__: list[str] = []

MANIFEST = "manifest.json"
SHARD = re.compile(r"shard-[0-9]{5}\.safetensors")
_ENDS = re.compile(r"\.ends-(.+)-with-(.+)")


def located(path: str | os.PathLike[str], verb: str) -> Path:
    """Return where a path of the user's leads, from the root on; raise if it can lead nowhere."""
    try:
        text = os.fsdecode(path)
        os.fsencode(text)
        absolute = os.path.abspath(text)
    except TypeError:
        raise CheckpointError(
            f"{verb}: expected a path; got {shown(path)}, a {type(path).__name__}"
        ) from None
    except UnicodeError:
        raise CheckpointError(f"{verb}: no file can have the name {shown(path)}") from None
    except OSError as error:
        raise CheckpointError(
            f"{verb}: {shown(path)} is relative to the working directory, which cannot be found "
            f"({error}); give a path from the root on"
        ) from error
    if "\0" in absolute:
        raise CheckpointError(f"{verb}: no file can have the name {shown(path)}")
    if absolute == os.path.sep:
        raise CheckpointError(f"{verb}: expected a folder below {absolute}; got {shown(path)}")
    return Path(absolute)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Folder]:
    """Have a folder of the user's open."""
    folder = files.active.open_folder(path)
    try:
        yield folder
    finally:
        _close(folder)


@contextlib.contextmanager
def entered(entry: Entry) -> Iterator[Folder]:
    """Have a folder of our own open."""
    folder = files.active.enter(entry)
    try:
        yield folder
    finally:
        _close(folder)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Be the only one who writes what ``path`` names, as :func:`written`; make those above it."""
    make_folders(path.parent)
    with (
        opened(path.parent) as parent,
        FolderLock(parent / f".lock-{path.name}", f"save to {path}"),
        written(parent / path.name),
    ):
        yield


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Folder]:
    """Have the folder open that will be at ``path``, to write into."""
    with opened(path.parent) as parent, entered(_beside(parent / path.name, "tmp")) as folder:
        yield folder


@contextlib.contextmanager
def written(place: Entry, ending: Iterable[Entry] = ()) -> Iterator[None]:
    """Make :func:`unfinished` to write into; at the end, and not before, it is at ``place``.

    From that moment on those that are ``ending`` are not :func:`within` the folder any more;
    :func:`settle` removes them. The caller holds a lock, and has synced the files in it. After an
    error what was there before is there still, and nothing else is left. If the process is killed,
    the next call cleans up.
    """
    tmp, old, pid = _beside(place, "tmp"), _beside(place, "old"), os.getpid()
    _check_replaceable(place)
    _recover(place)
    files.active.make_folder(tmp)
    is_placed = False
    try:
        yield
        with entered(tmp) as folder:
            files.active.sync_folder(folder)
        if files.active.kind(place) == "folder":
            files.active.rename(place, old)
        marks = [_ending(place, other) for other in ending]
        for mark in marks:  # while nothing is there: so they count from the renaming on
            files.active.close(files.active.create(mark))
        if marks:
            files.active.sync_folder(place.folder)
        files.active.rename(tmp, place)
        is_placed = True
        files.active.sync_folder(place.folder)
    except BaseException:
        if os.getpid() != pid:  # a child that was forked meanwhile ends, and its parent goes on
            raise
        # What cannot be done now, the next save will do.
        with contextlib.suppress(OSError, CheckpointError):
            if is_placed:
                files.active.rename(place, tmp)
            _recover(place)
        raise
    with contextlib.suppress(OSError, CheckpointError):
        _let_go_of_old(place)


def discard(place: Entry) -> None:
    """Remove a checkpoint: it is gone at once, even if its files are removed one by one."""
    _check_own(place, "removing it")
    litter = _beside(place, "tmp")
    _remove(litter)
    files.active.rename(place, litter)
    _remove(litter)


def clean(parent: Folder, is_ours: re.Pattern[str]) -> None:
    """Remove what killed saves of names like ``is_ours`` have left in a folder."""
    for name in files.active.names(parent):
        kind, _, rest = name.partition("-")
        if kind in (".tmp", ".old") and is_ours.fullmatch(rest):
            _recover(parent / rest)
    settle(parent, is_ours)


def settle(parent: Folder, is_ours: re.Pattern[str]) -> None:
    """Remove what has ended with something that is there."""
    marks = {name: _ENDS.fullmatch(name) for name in files.active.names(parent)}
    for name, mark in marks.items():
        if mark is None or not all(map(is_ours.fullmatch, mark.groups())):
            continue
        ended, end = (parent / each for each in mark.groups())
        if files.active.kind(end) is not None:
            _recover(ended)
            if files.active.kind(ended) is not None:
                discard(ended)
            files.active.sync_folder(parent)  # before the mark goes
        files.active.remove(parent / name)


def within(parent: Path, is_ours: re.Pattern[str]) -> list[Path]:
    """Return the checkpoints in a folder whose names are like ``is_ours``, by name."""
    try:
        with opened(parent) as folder:
            names = set(files.active.names(folder))
    except FileNotFoundError:
        return []
    marks = filter(None, map(_ENDS.fullmatch, names))
    ended = {mark[1] for mark in marks if mark[2] in names}
    # One whose replacement was cut short is there under the name of the old one.
    own = {name.removeprefix(".old-") for name in names} - ended
    return sorted(parent / name for name in own if is_ours.fullmatch(name))


def open_existing(path: Path) -> Folder:
    """Open the checkpoint of that name, there or aside while it is replaced."""
    for _ in range(3):  # it may be put aside after the first look, and replaced before the second
        with contextlib.suppress(FileNotFoundError):
            return files.active.open_folder(path)
        with contextlib.suppress(FileNotFoundError), opened(path.parent) as parent:
            return files.active.enter(_beside(parent / path.name, "old"))
    return files.active.open_folder(path)


def make_folders(path: Path) -> None:
    """Create a folder and those above it, if need be."""
    with contextlib.suppress(FileNotFoundError), opened(path):
        return
    make_folders(path.parent)
    with opened(path.parent) as parent:
        with contextlib.suppress(FileExistsError):  # another process has been quicker
            files.active.make_folder(parent / path.name)
        files.active.sync_folder(parent)


def _close(folder: Folder) -> None:
    with contextlib.suppress(OSError):  # nothing was written by it
        files.active.close(folder.descriptor)


def _beside(place: Entry, kind: str) -> Entry:
    return place.folder / f".{kind}-{place.name}"


def _ending(place: Entry, other: Entry) -> Entry:
    return place.folder / f".ends-{other.name}-with-{place.name}"


def _recover(place: Entry) -> None:
    """Bring back what was there before a save that did not end; remove the rest."""
    _check_own(_beside(place, "old"), "removing it")
    _remove(_beside(place, "tmp"))
    if files.active.kind(place) is None:
        marks = [_ending(place, place.folder / name) for name in _ended_with(place)]
        for mark in marks:  # first: the old one ends nothing
            files.active.remove(mark)
        if marks:
            files.active.sync_folder(place.folder)
        old = _beside(place, "old")
        if files.active.kind(old) == "folder":
            files.active.rename(old, place)
    files.active.sync_folder(place.folder)
    _let_go_of_old(place)


def _ended_with(place: Entry) -> list[str]:
    marks = filter(None, map(_ENDS.fullmatch, files.active.names(place.folder)))
    return [mark[1] for mark in marks if mark[2] == place.name]


def _let_go_of_old(place: Entry) -> None:
    old, litter = _beside(place, "old"), _beside(place, "tmp")
    match files.active.kind(old):
        case "link":  # nothing that we have put there
            files.active.remove(old)
        case "folder" if files.active.kind(place) == "folder":
            # Under the other name first: what is called old is always whole.
            files.active.rename(old, litter)
            _remove(litter)


def _remove(entry: Entry) -> None:
    """Remove the files of a checkpoint and the folder; of a link, the link."""
    match files.active.kind(entry):
        case "link":
            files.active.remove(entry)
        case "folder":
            _check_own(entry, "removing it")
            with entered(entry) as folder:
                for name in files.active.names(folder):
                    files.active.remove(folder / name)
            files.active.remove_folder(entry)


def _check_replaceable(place: Entry) -> None:
    """Raise if there is something of the user's at a place."""
    match files.active.kind(place):
        case "link":
            raise CheckpointError(
                f"save to {place}: it is a link, which a save would replace; give the path that "
                f"it leads to, or remove it first"
            )
        case "other":
            raise CheckpointError(
                f"save to {place}: there is a file; choose another path, or remove it first"
            )
    _check_own(place, f"save to {place}")


def _check_own(entry: Entry, what: str) -> None:
    """Raise if something of the user's is in a folder that is to be removed."""
    if files.active.kind(entry) != "folder":
        return
    with entered(entry) as folder:
        foreign = [
            name
            for name in files.active.names(folder)
            if name != MANIFEST and not SHARD.fullmatch(name)
        ]
    if foreign:
        raise CheckpointError(
            f"{what}: {entry} is a folder that holds {foreign[0]!r}, which is no part of a "
            f"checkpoint and would be removed; choose another path, or remove it first"
        )
