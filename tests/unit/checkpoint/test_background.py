"""Background saves: the state at the call is saved, and errors are raised later."""

from __future__ import annotations

import threading
import time

import faults
import fork_server
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.checkpoint.storage import file_system
from dvkernels.errors import CheckpointError


class BlockedWrites(file_system.FileSystem):
    """File system that creates no file until ``may_write`` is set."""

    def __init__(self):
        self.may_write = threading.Event()

    def create(self, path):
        assert self.may_write.wait(60)
        return super().create(path)


def test_the_state_at_the_call_is_saved(tmp_path):
    weight, data, array = dv.Variable(np.ones(1000)), {"history": [1]}, np.ones(3)
    checkpoint = dv.Checkpoint(weight=weight, data=data, array=array)
    blocked = BlockedWrites()
    with file_system.using(blocked):
        checkpoint.save(tmp_path / "c", metadata=data, background=True)
        weight.assign(np.zeros(1000))
        array[:] = 0
        data["history"].append(2)
        blocked.may_write.set()
        checkpoint.close()
    restored = checkpoint.restore(tmp_path / "c")
    assert (weight.numpy() == 1).all()
    assert (array == 1).all()
    assert data == {"history": [1]} == restored.metadata


def test_a_save_waits_for_the_previous_one(tmp_path):
    weight = dv.Variable(0.0)
    with dv.Checkpoint(weight=weight) as checkpoint:
        for number in range(5):
            weight.assign(float(number))
            checkpoint.save(tmp_path / f"c{number}", background=True)
    for number in range(5):
        checkpoint.restore(tmp_path / f"c{number}")
        assert float(weight) == number


@pytest.mark.parametrize("ask", ["close", "save", "restore"])
def test_an_error_is_raised_once_by_the_next_call(tmp_path, ask):
    checkpoint = dv.Checkpoint(weight=dv.Variable(1.0))
    checkpoint.save(tmp_path / "c")
    with faults.injected(faults.Faults(room=10)):
        checkpoint.save(tmp_path / "c", background=True)
        with pytest.raises(CheckpointError, match="No space left"):
            getattr(checkpoint, ask)(*([] if ask == "close" else [tmp_path / "c"]))
    checkpoint.save(tmp_path / "c", background=True)
    checkpoint.close()
    checkpoint.close()
    checkpoint.restore(tmp_path / "c")


def test_an_object_that_cannot_be_saved_raises_in_the_call(tmp_path):
    with pytest.raises(CheckpointError, match="x"):
        dv.Checkpoint(x=object()).save(tmp_path / "c", background=True)


def test_the_memory_of_copies_is_reused(tmp_path):
    weight = dv.Variable(np.zeros(10))
    checkpoint = dv.Checkpoint(weight=weight)
    for _ in range(2):
        checkpoint.save(tmp_path / "c", background=True)
    first = checkpoint._saver._copies["weight"]
    checkpoint.save(tmp_path / "c", background=True)
    checkpoint.close()
    assert checkpoint._saver._copies["weight"] is first


STRICT = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
"""


def run(code, path):
    return fork_server.run(STRICT + code, path)


EXIT = """
import sys, time
import numpy as np
import dvkernels as dv
from dvkernels.checkpoint.storage import file_system

class Slow(file_system.FileSystem):
    def sync(self, descriptor):
        time.sleep(0.5)
        super().sync(descriptor)

file_system.active = Slow()
checkpoint = dv.Checkpoint(weight=dv.Variable(np.full(100_000, 3.0)))
checkpoint.save(sys.argv[1], background=True)
{ending}
"""


@pytest.mark.parametrize("ending", ["", "sys.exit(0)", "del checkpoint"])
def test_the_end_of_the_program_waits(tmp_path, ending):
    child = run(EXIT.format(ending=ending), tmp_path / "c")
    assert (child.returncode, child.stderr) == (0, "")
    weight = dv.Variable(np.zeros(100_000))
    dv.Checkpoint(weight=weight).restore(tmp_path / "c")
    assert (weight.numpy() == 3).all()


def test_an_error_that_was_not_raised_is_printed_at_the_end(tmp_path):
    (tmp_path / "file").write_text("in the way")
    child = run(EXIT.format(ending=""), tmp_path / "file" / "c")
    assert "a save in the background failed" in child.stderr


FORK = """
import os, sys, threading
import dvkernels as dv
from dvkernels.checkpoint.storage import file_system

class BlockedWrites(file_system.FileSystem):
    may_write = threading.Event()
    def create(self, path):
        assert self.may_write.wait(60)
        return super().create(path)

checkpoint = dv.Checkpoint(x=dv.Variable(1.0))
file_system.active = BlockedWrites()
checkpoint.save(sys.argv[1] + "/parent", background=True)
child = os.fork()
if not child:
    file_system.active = file_system.FileSystem()
    checkpoint.close()  # the parent's thread is not here
    checkpoint.save(sys.argv[1] + "/child", background=True)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
BlockedWrites.may_write.set()
checkpoint.close()
"""


def test_a_child_does_not_wait_for_its_parents_thread(tmp_path):
    child = run(FORK, tmp_path)
    assert child.returncode == 0, child.stderr
    for name in ("parent", "child"):
        found = dv.Variable(0.0)
        dv.Checkpoint(x=found).restore(tmp_path / name)
        assert float(found) == 1.0


def test_steps_continue_during_a_save(tmp_path):
    weight = dv.Variable(np.zeros(1000))
    checkpoint = dv.Checkpoint(weight=weight)
    blocked = BlockedWrites()
    with file_system.using(blocked):
        began = time.perf_counter()
        checkpoint.save(tmp_path / "c", background=True)
        assert time.perf_counter() - began < 30
        assert not (tmp_path / "c").exists()
        blocked.may_write.set()
        checkpoint.close()
    assert (tmp_path / "c").exists()
