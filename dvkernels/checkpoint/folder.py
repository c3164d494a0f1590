"""A folder that appears whole or not at all, and is replaced likewise.

Three names stand for a checkpoint at ``NAME`` while it is saved, all beside it:

* ``.tmp-NAME``: being written, or left behind by a save that was killed: litter.
* ``.old-NAME``: the one before, always whole; it counts where ``NAME`` is missing.
* ``.lock-NAME``: locked while somebody writes.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dvkernels.checkpoint import files
from dvkernels.checkpoint.lock import Lock
from dvkernels.errors import CheckpointError

__all__: list[str] = []

MANIFEST = "manifest.json"
SHARD = re.compile(r"shard-[0-9]{5}\.safetensors")


def existing(path: Path) -> Path:
    """Return where the checkpoint of that name is now: there, or aside while it is replaced."""
    old = _beside(path, "old")
    if not files.active.is_folder(path) and files.active.is_folder(old):
        return old
    return path


def lock(path: Path) -> Lock:
    """Return the lock of those who write what ``path`` names."""
    return Lock(_beside(path, "lock"), f"save to {path}")


@contextlib.contextmanager
def door(path: Path) -> Iterator[None]:
    """Be the only one who writes what ``path`` names; the folders above it are made."""
    make_folders(path.parent)
    with lock(path):
        yield


def new(path: Path) -> Path:
    """Return where what ``path`` will name is written."""
    return _beside(path, "tmp")


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Make :func:`new` to write into; at the end, and not before, it is what ``path`` names.

    The caller holds a lock, and has synced the files in it. After an error what was at ``path``
    before is there still, and nothing else is left. If the process is killed, the next call cleans
    up.
    """
    tmp, old, pid = new(path), _beside(path, "old"), os.getpid()
    _recover(path)
    _check_replaceable(path)
    files.active.make_folder(tmp)
    is_placed = False
    try:
        yield
        files.active.sync_folder(tmp)
        if files.active.is_folder(path):
            files.active.rename(path, old)
        files.active.rename(tmp, path)
        is_placed = True
        files.active.sync_folder(path.parent)
    except BaseException:
        if os.getpid() != pid:  # a child that was forked meanwhile ends, and its parent goes on
            raise
        with contextlib.suppress(OSError):  # what cannot be done now, the next save will do
            if is_placed:
                files.active.rename(path, tmp)
            _recover(path)
        raise
    with contextlib.suppress(OSError):
        _let_go_of_old(path)


def discard(path: Path) -> None:
    """Remove a checkpoint: it is gone at once, even if its files are removed one by one."""
    litter = _beside(path, "tmp")
    _remove(litter)
    files.active.rename(path, litter)
    _remove(litter)


def clean(parent: Path, is_ours: re.Pattern[str]) -> None:
    """Remove what killed saves of names like ``is_ours`` have left in a folder."""
    for name in files.active.names(parent):
        kind, _, rest = name.partition("-")
        if kind in (".tmp", ".old") and is_ours.fullmatch(rest):
            _recover(parent / rest)


def within(parent: Path, is_ours: re.Pattern[str]) -> list[Path]:
    """Return the checkpoints in a folder whose names are like ``is_ours``, by name."""
    try:
        names = files.active.names(parent)
    except FileNotFoundError:
        return []
    # One whose replacement was cut short is there under the name of the old one.
    own = {name.removeprefix(".old-") for name in names}
    return sorted(parent / name for name in own if is_ours.fullmatch(name))


def make_folders(path: Path) -> None:
    """Create a folder and those above it, if need be."""
    if files.active.is_folder(path):
        return
    make_folders(path.parent)
    with contextlib.suppress(FileExistsError):  # another process has been quicker
        files.active.make_folder(path)
    files.active.sync_folder(path.parent)


def _beside(path: Path, kind: str) -> Path:
    return path.parent / f".{kind}-{path.name}"


def _recover(path: Path) -> None:
    """Bring back what was there before a save that did not end; remove the rest."""
    _remove(_beside(path, "tmp"))
    old = _beside(path, "old")
    if files.active.is_folder(old) and not files.active.is_folder(path):
        files.active.rename(old, path)
    files.active.sync_folder(path.parent)
    _let_go_of_old(path)


def _let_go_of_old(path: Path) -> None:
    old, litter = _beside(path, "old"), _beside(path, "tmp")
    if files.active.is_folder(old):
        # Under the other name first: what is called old is always whole.
        files.active.rename(old, litter)
        _remove(litter)


def _remove(folder: Path) -> None:
    if files.active.is_folder(folder):
        for name in files.active.names(folder):
            files.active.remove(folder / name)
        files.active.remove_folder(folder)


def _check_replaceable(path: Path) -> None:
    """Raise if there is something of the user's at ``path``."""
    if not files.active.is_folder(path):
        return
    foreign = [
        name for name in files.active.names(path) if name != MANIFEST and not SHARD.fullmatch(name)
    ]
    if foreign:
        raise CheckpointError(
            f"save to {path}: it is a folder that holds {foreign[0]!r}, which is no part of a "
            f"checkpoint; a save would replace it; choose another path, or remove it first"
        )
