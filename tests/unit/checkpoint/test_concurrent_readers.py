"""Concurrent readers get the old checkpoint or the new one, whole, and never report damage."""

from __future__ import annotations

import contextlib
import gc
import warnings

import numpy as np
import pytest
from threads_as_workers import at_once, transports

import dvkernels as dv
from dvkernels.checkpoint.storage import file_system
from dvkernels.cli.main import main
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.errors import CheckpointDamagedError


class Interleaving(file_system.FileSystem):
    """File system that calls ``act`` before operation number ``at``, ``times`` times in all."""

    def __init__(self, at, act, times=1):
        self.at, self.act, self.left, self.count = at, act, times, 0

    def __getattribute__(self, name):
        value = object.__getattribute__(self, name)
        if name in file_system.FileSystem.__dict__:
            self.count += 1
            if self.count >= self.at and self.left:
                self.left -= 1
                with file_system.using(file_system.FileSystem()):
                    self.act()
        return value


class Writer:
    def __init__(self, folder, **options):
        self.number = 0
        self.arrays = [np.zeros(50), np.zeros(9)]
        self.checkpoint = dv.Checkpoint(arrays=self.arrays)
        self.folder = folder
        self.manager = dv.CheckpointManager(self.checkpoint, folder, 1)

    def _next(self):
        self.number += 1
        for array in self.arrays:
            array[:] = self.number

    def replace(self):
        self._next()
        self.checkpoint.save(self.folder / "run")

    def rotate(self):
        self._next()
        self.manager.save(self.number)


def read(objects):
    (number,) = {float(x) for array in objects for x in array}
    return number


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("verb", ["replace", "rotate"])
def test_a_save_between_any_two_operations_of_a_restore(tmp_path, verb, times):
    writer = Writer(tmp_path)
    write = getattr(writer, verb)
    found = [np.zeros(50), np.zeros(9)]
    checkpoint = dv.Checkpoint(arrays=found)
    manager = dv.CheckpointManager(checkpoint, tmp_path)
    write()
    for at in range(1, 100):
        before = writer.number
        interleaving = Interleaving(at, write, times)
        with file_system.using(interleaving), warnings.catch_warnings():
            warnings.simplefilter("error")
            if verb == "replace":
                checkpoint.restore(tmp_path / "run")
            else:
                manager.restore_latest()
        assert before <= read(found) <= writer.number
        if interleaving.left == times:
            return
    pytest.fail("a restore has fewer operations")


def test_a_missing_checkpoint_is_reported_at_once(tmp_path):
    with pytest.raises(CheckpointDamagedError, match="there is none"):
        dv.Checkpoint(x=np.zeros(1)).restore(tmp_path / "run")
    assert dv.CheckpointManager(dv.Checkpoint(x=1), tmp_path).restore_latest() is None


def test_the_verify_command_during_saves(tmp_path, capsys):
    writer = Writer(tmp_path)
    writer.rotate()
    for at in range(1, 40):
        interleaving = Interleaving(at, writer.rotate)
        with file_system.using(interleaving):
            assert main(["checkpoint", "verify", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert said.count("\n") == said.count("PASS") + said.count("GONE") == 1
        if interleaving.left:
            return
    pytest.fail("it has fewer operations")


def test_all_workers_read_the_same_checkpoint_during_saves(tmp_path):
    writer = Writer(tmp_path)
    writer.replace()

    def work(group):
        with dv.Strategy(["cpu:0"], workers=group) as strategy:
            with strategy.scope():
                variable = dv.Variable(0.0)
            found = [np.zeros(50), np.zeros(9)]
            dv.Checkpoint(arrays=found, variable=variable).restore(tmp_path / "run", partial=True)
            return read(found)

    for at in range(1, 40, 3):
        with file_system.using(Interleaving(at, writer.replace)):
            found = at_once(
                *(
                    lambda group=group: work(group)
                    for group in [WorkerGroup(transport) for transport in transports(2)]
                )
            )
        for one in found:
            if isinstance(one, Exception):
                raise one
        assert len(set(found)) == 1


def test_files_are_closed(tmp_path):
    """Also the files of failed attempts."""

    class Counting(file_system.FileSystem):
        open_now = 0

        def __getattribute__(self, name):
            operation = object.__getattribute__(self, name)
            if name not in ("open", "open_folder", "enter", "create", "open_lock", "close"):
                return operation

            def act(*arguments):
                result = operation(*arguments)
                Counting.open_now += -1 if name == "close" else 1
                return result

            return act

    gc.collect()  # closes the files that other tests have left open
    writer = Writer(tmp_path)
    writer.replace()
    for act in (
        writer.replace,
        writer.rotate,
        lambda: writer.checkpoint.restore(tmp_path / "run"),
        lambda: writer.checkpoint.restore(tmp_path / "none"),
        writer.manager.restore_latest,
    ):
        with file_system.using(Counting()), contextlib.suppress(CheckpointDamagedError):
            act()
        assert Counting.open_now == 0
