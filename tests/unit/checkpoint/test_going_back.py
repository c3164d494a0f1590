"""Going back to an earlier step: the next save removes the later steps, atomically."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import warnings

import faults
import numpy as np
import pytest
from threads_as_workers import at_once, transports

import dvkernels as dv
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.errors import CheckpointDamagedError, CheckpointError

OLD = (10, 20, 30, 40, 50)


class Life:
    """Run in a folder, whose checkpoints hold the number of its life and the step."""

    def __init__(self, folder, number=1, **options):
        self.says = np.zeros(2)
        self.number = number
        self.manager = dv.CheckpointManager(dv.Checkpoint(says=self.says), folder, None, **options)

    def save(self, step, **options):
        self.says[:] = self.number, step
        self.manager.save(step, **options)

    @property
    def steps(self):
        return [int(path.name.split("-")[1]) for path in self.manager.checkpoints]


@pytest.fixture
def life(tmp_path):
    life = Life(tmp_path)
    for step in OLD:
        life.save(step)
    life.number = 2
    return life


def latest(folder):
    found = Life(folder)
    found.manager.restore_latest()
    return tuple(found.says)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("step", [30, 31, 40, 45, 50, 60])
def test_the_next_save_removes_the_later_steps(tmp_path, life, step, background):
    assert life.manager.restore(30).step == 30
    assert life.says.tolist() == [1, 30]
    assert life.steps == list(OLD)
    with life.manager:
        life.save(step, background=background)
    assert life.steps == sorted({10, 20, 30, step})
    assert latest(tmp_path) == (2, step)
    life.save(step + 1)
    assert life.steps == sorted({10, 20, 30, step, step + 1})
    assert sorted(os.listdir(tmp_path)) == [path.name for path in life.manager.checkpoints]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("goes_back", [False, True])
def test_a_save_below_the_newest_is_refused_at_once(tmp_path, life, goes_back, background):
    if goes_back:
        life.manager.restore(30)
    for below in (0, 29) if goes_back else (0, 31, 49):
        with pytest.raises(CheckpointError, match=r"below the newest, step-000000.0; .*restore\("):
            life.save(below, background=background)
    assert life.steps == list(OLD)


def test_steps_that_another_run_has_saved_since_are_not_removed(tmp_path, life):
    life.manager.restore(30)
    Life(tmp_path).save(70)
    with pytest.raises(CheckpointError, match="step-00000070"):
        life.save(31)
    life.save(80)
    assert life.steps == [10, 20, 30, 70, 80]


def test_restoring_the_latest_afterwards_removes_nothing(tmp_path, life):
    life.manager.restore(30)
    life.manager.restore_latest()
    with pytest.raises(CheckpointError, match="step-00000050"):
        life.save(31)


def test_only_an_existing_step_can_be_restored(tmp_path, life):
    with pytest.raises(CheckpointError, match="expected step-00000031; there is step-00000010, "):
        life.manager.restore(31)
    for step in (-1, True, "x", 10**5000):
        with pytest.raises(CheckpointError, match=r"CheckpointManager\.restore: expected a step"):
            life.manager.restore(step)
    assert life.says.tolist() == [1, 50]


def test_restoring_an_older_step_by_its_path_warns(tmp_path, life):
    checkpoint = dv.Checkpoint(says=np.zeros(2))
    (tmp_path / "best").symlink_to("step-00000020")
    for name, step in (("step-00000030", 30), ("best", 20)):
        with pytest.warns(RuntimeWarning, match=rf"step-00000050, .*manager\.restore\({step}\)"):
            checkpoint.restore(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.restore(tmp_path / "step-00000050")
        checkpoint.save(tmp_path / "other")
        checkpoint.restore(tmp_path / "other")


def test_damaged_checkpoints_that_were_skipped_do_not_block_a_save(tmp_path, life):
    for step in (40, 50):
        faults.truncate(tmp_path / f"step-000000{step}" / "manifest.json", 5)
    with pytest.warns(RuntimeWarning, match="newer ones are damaged"):
        life.manager.restore_latest()
    life.save(31)
    assert life.steps == [10, 20, 30, 31]


# The save that removes the later steps is killed at each of its operations: before its renaming
# the old life is complete, after it the new one is valid, whatever files are left.
@pytest.mark.parametrize(
    ("step", "loses"),
    [(40, ("names",))]
    + [
        pytest.param(step, loses, marks=pytest.mark.slow)
        for step in (30, 31, 40, 60)
        for loses in ((), ("content",), ("names",))
    ],
)
def test_a_kill_at_any_operation_of_the_save_that_removes_later_steps(tmp_path, step, loses):
    old = (30, 40, 50)
    life = Life(tmp_path / "template")
    for each in old:
        life.save(each)
    found = []
    for number in range(1, 300):
        folder = tmp_path / "life"
        shutil.copytree(tmp_path / "template", folder)
        life = Life(folder, 2)
        life.manager.restore(30)
        broken = faults.Faults(crash_at=number, loses=loses)
        with faults.injected(broken), contextlib.suppress(faults.Crash):
            life.save(step)
            broken.die()
        found.append(latest(folder))
        again = Life(folder)
        expected = list(old) if found[-1] == (1, 50) else sorted({30, step})
        assert again.steps == expected
        again.save(90)
        assert again.steps == [*expected, 90]
        shutil.rmtree(folder)
        if broken.count < number:
            break
    assert set(found) == {(1, 50), (2, step)}
    assert found == sorted(found), "a valid checkpoint stays valid"


@pytest.mark.parametrize("background", [False, True])
def test_several_workers_go_back_together(tmp_path, background):
    def work(group, act):
        with dv.Strategy(["cpu:0"], workers=group) as strategy:
            with strategy.scope():
                weight = dv.Variable(np.zeros(3))
            with dv.CheckpointManager(dv.Checkpoint(weight=weight), tmp_path, None) as manager:
                act(manager, weight)

    def each(act):
        groups = [WorkerGroup(transport) for transport in transports(2)]
        calls = [functools.partial(work, group, act) for group in groups]
        for found in at_once(*calls):
            if isinstance(found, Exception):
                raise found

    def first(manager, weight):
        for step in OLD:
            weight.assign(np.full(3, float(step)))
            manager.save(step)

    def second(manager, weight):
        with pytest.raises(CheckpointError, match="below the newest"):
            manager.save(31, background=background)
        manager.restore(30)
        assert weight.numpy().tolist() == [30.0] * 3
        manager.save(31, background=background)
        manager.close()
        manager.save(32, background=background)

    each(first)
    each(second)
    assert Life(tmp_path).steps == [10, 20, 30, 31, 32]


def test_going_back_to_a_damaged_step_is_an_error(tmp_path, life):
    faults.truncate(tmp_path / "step-00000030" / "manifest.json", 5)
    with pytest.raises(CheckpointDamagedError):
        life.manager.restore(30)
    with pytest.raises(CheckpointError, match="below the newest"):
        life.save(31)
