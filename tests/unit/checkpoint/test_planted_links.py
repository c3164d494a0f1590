"""Links and files that others put into the folder: nothing outside is touched or deleted."""

from __future__ import annotations

import itertools
import os
import shutil

import numpy as np
import pytest
from kinds import daily

import dvkernels as dv
from dvkernels.checkpoint.storage import file_system
from dvkernels.errors import CheckpointError

TREASURE = {"thesis.txt": b"years", "manifest.json": b"{}", "shard-00000.safetensors": b"bytes"}


@pytest.fixture
def treasure(tmp_path):
    """Folder elsewhere, whose files have the names of a checkpoint's files."""
    folder = tmp_path / "treasure"
    folder.mkdir()
    for name, content in TREASURE.items():
        (folder / name).write_bytes(content)
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == TREASURE


@pytest.fixture
def here(tmp_path):
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def manager(folder, number=0):
    return dv.CheckpointManager(dv.Checkpoint(x=np.full(3, float(number))), folder, 1)


def saves(how, here):
    """Save twice, by a manager or a checkpoint; return the path of a good checkpoint."""
    if how == "manager":
        with manager(here) as kept:
            kept.save(1)
            return kept.save(2)
    with dv.Checkpoint(x=np.zeros(3)) as checkpoint:
        for _ in range(2):
            checkpoint.save(here / "step-00000002", background=how == "background")
    return here / "step-00000002"


NAMES = [
    ".tmp-step-00000002", ".old-step-00000002", ".lock-step-00000002", ".lock", "step-00000002",
    ".tmp-step-00000001", ".old-step-00000001", "step-00000001", "step-00000000",
    ".ends-step-00000001-with-step-00000002", ".ends-step-00000000-with-step-00000001",
]  # fmt: skip


HOWS = ["save", "background", "manager"]
TARGETS = ["treasure", "treasure/thesis.txt", "absent"]
# Daily every two of a name, a way to save and a target meet, or nearly so.
PAIRWISE = [
    (name, how, TARGETS[(k + shift) % 3])
    for k, name in enumerate(NAMES)
    for shift, how in enumerate(HOWS)
]


@pytest.mark.parametrize(
    ("name", "how", "to"), daily([*itertools.product(NAMES, HOWS, TARGETS)], *PAIRWISE)
)
def test_links_are_removed_or_refused_but_not_followed(tmp_path, treasure, here, name, how, to):
    (here / name).symlink_to(tmp_path / to)
    try:
        good = saves(how, here)
    except CheckpointError:
        assert (here / name).is_symlink(), "what is refused is left alone"
    else:
        found = np.ones(3)
        dv.Checkpoint(x=found).restore(good)
        assert not found.any()
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["save", "manager"])
def test_folders_with_files_of_the_user_are_left_alone(treasure, here, name, how):
    shutil.copytree(treasure, here / name)
    with pytest.raises(CheckpointError) if name in NAMES[:2] else _either():
        saves(how, here)
    assert (here / name / "thesis.txt").read_bytes() == b"years"


class _either:
    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        return kind is not None and issubclass(kind, CheckpointError)


def test_a_lock_file_with_other_hard_links_is_not_written_to(treasure, here):
    for name in (".lock", ".lock-step-00000002"):
        os.link(treasure / "thesis.txt", here / name)
    for how in ("save", "manager"):
        with pytest.raises(CheckpointError, match="other names"):
            saves(how, here)


@pytest.mark.parametrize("name", [".tmp-run", "run", ".old-run"])
def test_a_folder_that_is_replaced_by_a_link_during_a_save(tmp_path, treasure, here, name):
    """At each operation the folder is replaced by a link: an open folder stays the same one."""

    class Exchanging(file_system.FileSystem):
        left = 0

        def __getattribute__(self, operation):
            if operation in file_system.FileSystem.__dict__:
                Exchanging.left -= 1
                if Exchanging.left == 0:
                    place = here / name
                    if place.is_dir():
                        place.rename(here / f"moved-{len(os.listdir(here))}")
                    place.symlink_to(treasure)
            return object.__getattribute__(self, operation)

    checkpoint = dv.Checkpoint(x=np.zeros(3))
    for number in range(1, 100):
        shutil.rmtree(here)
        here.mkdir()
        checkpoint.save(here / "run")
        Exchanging.left = number
        with file_system.using(Exchanging()), _either():
            checkpoint.save(here / "run")
        assert sorted(os.listdir(treasure)) == sorted(TREASURE)
        if Exchanging.left > 0:
            return
    pytest.fail("a save has fewer operations")


def test_links_in_the_users_own_path_are_followed(tmp_path, here):
    """A folder reached through a link, and a checkpoint that was moved and replaced by a link."""
    (tmp_path / "scratch").symlink_to(here)
    kept = dv.CheckpointManager(dv.Checkpoint(x=np.zeros(3)), tmp_path / "scratch" / "run", 2)
    kept.save(1)
    assert (here / "run" / "step-00000001").is_dir()
    shutil.move(here / "run" / "step-00000001", tmp_path / "best")
    (here / "run" / "step-00000001").symlink_to(tmp_path / "best")
    assert kept.restore_latest().step == 1
    kept.save(2)
    kept.save(3)
    assert sorted(os.listdir(here / "run")) == ["step-00000002", "step-00000003"]
    dv.Checkpoint(x=np.zeros(3)).restore(tmp_path / "best")
    (here / "latest").symlink_to("run/step-00000003")
    dv.Checkpoint(x=np.zeros(3)).restore(here / "latest")
    with pytest.raises(CheckpointError, match="it is a link"):
        dv.Checkpoint(x=np.zeros(3)).save(here / "latest")
    dv.Checkpoint(x=np.zeros(3)).restore(here / "run" / "step-00000003")
