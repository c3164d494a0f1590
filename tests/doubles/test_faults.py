"""Fault injection: injected faults have their effects, and unsafe saves are detected."""

from __future__ import annotations

import errno
import os

import faults
import pytest
from faults import Crash, Faults, check_every_crash, injected

from dvkernels.checkpoint.storage import atomic_folder, file_system


def save(path, content, *, syncs=True, renames=True):
    """Save to a temporary file and rename it; without ``syncs`` or ``renames`` unsafely."""
    with atomic_folder.opened(path.parent) as parent:
        _save(parent, path.name, content, syncs, renames)


def _save(parent, name, content, syncs, renames):
    beside = parent / (f"{name}.new" if renames else name)
    if file_system.active.kind(beside):
        file_system.active.remove(beside)
    descriptor = file_system.active.create(beside)
    file_system.active.write(descriptor, content, 0)
    if syncs:
        file_system.active.sync(descriptor)
    file_system.active.close(descriptor)
    if renames:
        file_system.active.rename(beside, parent / name)
    file_system.active.sync_folder(parent)


def test_a_good_save_passes_and_bad_ones_are_found(tmp_path):
    path = tmp_path / "x"

    def check():
        assert path.read_bytes() in (b"old", b"new")

    path.write_bytes(b"old")
    assert check_every_crash(lambda: save(path, b"new"), check) == 9
    path.write_bytes(b"old")
    with pytest.raises((AssertionError, OSError)):
        check_every_crash(lambda: save(path, b"new", renames=False), check)
    path.write_bytes(b"old")
    check_every_crash(lambda: save(path, b"new", syncs=False), check)
    path.write_bytes(b"old")
    with pytest.raises(AssertionError):  # only a power failure shows that it was not synced
        check_every_crash(lambda: save(path, b"new", syncs=False), check, loses={"content"})


@pytest.fixture
def here(tmp_path):
    with atomic_folder.opened(tmp_path) as opened:
        yield opened


def test_nothing_happens_after_death(tmp_path, here):
    with injected(Faults(crash_at=3)) as broken:
        descriptor = file_system.active.create(here / "x")
        file_system.active.write(descriptor, b"abc", 0)
        for _ in range(3):
            with pytest.raises(Crash):
                file_system.active.write(descriptor, b"defg", 3)
    assert (tmp_path / "x").read_bytes() == b"abcde"  # half of the write that it died in
    assert broken.calls == ["create", "write", "write"]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)


def test_a_power_failure_takes_what_was_not_synced(tmp_path, here):
    (tmp_path / "old").write_bytes(b"old")
    with injected(Faults(loses={"content", "names"})) as broken:
        for name in ("synced", "unsynced"):
            descriptor = file_system.active.create(here / name)
            file_system.active.write(descriptor, b"abc", 0)
            if name == "synced":
                file_system.active.sync(descriptor)
            file_system.active.close(descriptor)
        file_system.active.sync_folder(here)
        file_system.active.rename(here / "old", here / "renamed")
        file_system.active.make_folder(here / "folder")
        with pytest.raises(Crash):
            broken.die()
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"old": b"old", "synced": b"abc", "unsynced": b""}


def test_full_and_failing_disks(here):
    with injected(Faults(room=4)):
        descriptor = file_system.active.create(here / "x")
        assert file_system.active.write(descriptor, b"abc", 0) == 3
        assert file_system.active.write(descriptor, b"def", 3) == 1
        with pytest.raises(OSError, match="No space") as told:
            file_system.active.write(descriptor, b"ef", 4)
        assert told.value.errno == errno.ENOSPC
        file_system.active.close(descriptor)
    with injected(Faults(fail_at=2, counted={"size"}, error=errno.EIO)):
        descriptor = file_system.active.open(here / "x")
        assert file_system.active.size(descriptor) == 4
        with pytest.raises(OSError, match="injected"):
            file_system.active.size(descriptor)
        assert file_system.active.size(descriptor) == 4
        file_system.active.close(descriptor)


def test_flipped_and_cut(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(4))
    faults.flip_bit(path, 9)
    assert path.read_bytes() == bytes([0, 2, 0, 0])
    faults.truncate(path, 2)
    assert path.read_bytes() == bytes([0, 2])
