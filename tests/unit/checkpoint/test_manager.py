"""CheckpointManager: which checkpoints are kept, and which one is restored."""

from __future__ import annotations

import logging
import os

import faults
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import CheckpointDamagedError, CheckpointError


def steps(manager):
    return [int(path.name.split("-")[1]) for path in manager.checkpoints]


@pytest.mark.parametrize(
    ("max_to_keep", "keep_every", "expected"),
    [
        (2, None, [9, 10]),
        (1, None, [10]),
        (None, None, list(range(1, 11))),
        (2, 4, [4, 8, 9, 10]),
        (1, 3, [3, 6, 9, 10]),
        (100, 5, list(range(1, 11))),
    ],
)
def test_which_steps_are_kept(tmp_path, max_to_keep, keep_every, expected):
    manager = dv.CheckpointManager(
        dv.Checkpoint(x=np.zeros(2)), tmp_path / "a" / "b", max_to_keep, keep_every=keep_every
    )
    assert manager.latest_checkpoint is None
    assert manager.restore_latest() is None
    for step in range(1, 11):
        assert manager.save(step) == manager.latest_checkpoint
    assert steps(manager) == expected
    assert sorted(os.listdir(manager.directory)) == [path.name for path in manager.checkpoints]


def test_the_newest_may_be_saved_again(tmp_path):
    x = np.zeros(2)
    manager = dv.CheckpointManager(dv.Checkpoint(x=x), tmp_path, 1)
    for number in (1, 2):
        x[:] = number
        manager.save(10)
    assert steps(manager) == [10]
    manager.restore_latest()
    assert x.tolist() == [2, 2]


def test_steps_of_nine_digits(tmp_path):
    manager = dv.CheckpointManager(dv.Checkpoint(x=1), tmp_path, 2)
    for step in (5, 99_999_999, 100_000_000):
        manager.save(step)
    assert steps(manager) == [99_999_999, 100_000_000]
    restored = manager.restore_latest()
    assert restored.step == 100_000_000


def test_damaged_checkpoints_are_skipped_with_a_warning(tmp_path, caplog):
    x = np.zeros(2)
    manager = dv.CheckpointManager(dv.Checkpoint(x=x), tmp_path)
    for step in range(1, 5):
        x[:] = step
        manager.save(step)
    faults.flip_bit(tmp_path / "step-00000004" / "shard-00000.safetensors", 639)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    with (
        caplog.at_level(logging.WARNING, "dvkernels"),
        pytest.warns(RuntimeWarning, match=r"step-00000002, because.*step-00000004.*step-00000003"),
    ):
        restored = manager.restore_latest()
    assert (restored.step, x.tolist()) == (2, [2, 2])
    assert "step-00000004" in caplog.text
    for step in (1, 2):
        faults.truncate(tmp_path / f"step-0000000{step}" / "manifest.json", 10)
    with pytest.raises(CheckpointDamagedError, match="every checkpoint"):
        manager.restore_latest()
    assert x.tolist() == [2, 2]
    manager.save(5)
    assert manager.restore_latest().step == 5


def test_a_mismatch_is_raised_and_no_older_checkpoint_restored(tmp_path):
    dv.CheckpointManager(dv.Checkpoint(x=np.zeros(2)), tmp_path).save(1)
    dv.CheckpointManager(dv.Checkpoint(x=np.zeros(3)), tmp_path).save(2)
    with pytest.raises(CheckpointError, match=r"float64\[2\].*float64\[3\]"):
        dv.CheckpointManager(dv.Checkpoint(x=np.zeros(2)), tmp_path).restore_latest()


def test_background_saves(tmp_path):
    x = np.zeros(2)
    with dv.CheckpointManager(dv.Checkpoint(x=x), tmp_path, 2) as manager:
        for step in range(6):
            x[:] = step
            manager.save(step, background=True)
        x[:] = -1
        assert manager.restore_latest().step == 5
        assert x.tolist() == [5, 5]
    assert steps(manager) == [4, 5]


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    for name in ("step-1", ".tmp-notes", "step-000000012x", "notes"):
        (tmp_path / name).mkdir()
    manager = dv.CheckpointManager(dv.Checkpoint(x=1), tmp_path, 1)
    for step in range(3):
        manager.save(step)
    assert steps(manager) == [2]
    assert {"step-1", ".tmp-notes", "step-000000012x", "notes"} < set(os.listdir(tmp_path))


def test_an_old_checkpoint_with_a_file_of_the_user_is_kept(tmp_path, caplog):
    manager = dv.CheckpointManager(dv.Checkpoint(x=1), tmp_path, 1)
    manager.save(1)
    (tmp_path / "step-00000001" / "notes.txt").write_text("the best so far")
    with caplog.at_level(logging.WARNING, "dvkernels"):
        for step in (2, 3, 4):
            manager.save(step)
    assert steps(manager) == [1, 4]
    assert "'notes.txt', which is no part of a checkpoint" in caplog.text
    manager.restore(1)


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", 10**18, None])
def test_a_step_is_a_number(tmp_path, step):
    with pytest.raises(CheckpointError, match="step"):
        dv.CheckpointManager(dv.Checkpoint(x=1), tmp_path).save(step)


@pytest.mark.parametrize("arguments", [{"max_to_keep": 0}, {"keep_every": 0}, {"max_to_keep": 1.5}])
def test_numbers_to_keep_are_checked(tmp_path, arguments):
    with pytest.raises(CheckpointError, match="above 0"):
        dv.CheckpointManager(dv.Checkpoint(x=1), tmp_path, **arguments)
    with pytest.raises(CheckpointError, match=r"dv\.Checkpoint"):
        dv.CheckpointManager({"x": 1}, tmp_path)
