"""Durability: after any failure of disk or process a whole checkpoint exists, and saves work."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading

import faults
import numpy as np
import pytest
from kinds import daily

import dvkernels as dv
from dvkernels.checkpoint.storage import file_system
from dvkernels.errors import CheckpointDamagedError, CheckpointError


class Run:
    """Objects that all hold the number of the last save, and the path where they are saved."""

    def __init__(self, path, uses_manager=False):
        self.number = 0
        self.path = path
        self.uses_manager = uses_manager
        self.objects = self.fresh()

    @staticmethod
    def fresh():
        return {
            "weight": dv.Variable(np.zeros(300)),
            "other": np.zeros((2, 5)),
            "data": {"number": 0},
        }

    def save(self):
        self.number += 1
        self.objects["weight"].assign(np.full(300, float(self.number)))
        self.objects["other"][...] = self.number
        self.objects["data"]["number"] = self.number
        checkpoint = dv.Checkpoint(**self.objects)
        if self.uses_manager:
            dv.CheckpointManager(checkpoint, self.path, 2).save(self.number)
        else:
            checkpoint.save(self.path)

    def check(self):
        """Restore the checkpoint, which must be whole; return its number."""
        found = self.fresh()
        checkpoint = dv.Checkpoint(**found)
        if self.uses_manager:
            assert dv.CheckpointManager(checkpoint, self.path).restore_latest() is not None
        else:
            checkpoint.restore(self.path)
        number = found["data"]["number"]
        assert number >= 1
        assert (found["weight"].numpy() == number).all()
        assert (found["other"] == number).all()
        return number


LOSSES = [(), ("content",), ("names",), ("content", "names")]


@pytest.mark.parametrize(
    ("uses_manager", "loses"),
    daily(
        [*itertools.product([False, True], LOSSES)],
        *zip([False, True, True, False], LOSSES, strict=True),
    ),
)
def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path, uses_manager, loses):
    run = Run(tmp_path / "a" / "b", uses_manager)
    run.save()
    num_operations = faults.check_every_crash(run.save, run.check, loses=loses)
    assert num_operations > 20
    assert run.check() == run.number
    run.save()  # also removes the leftovers of the last kill
    names = os.listdir(tmp_path / "a" / "b") if uses_manager else os.listdir(tmp_path / "a")
    assert not [name for name in names if name.startswith(".")]


def test_a_completed_save_survives_a_power_failure(tmp_path):
    run = Run(tmp_path / "c")
    for number in range(1, 4):
        with faults.injected(faults.Faults(loses={"content", "names"})) as broken:
            run.save()
            with pytest.raises(faults.Crash):
                broken.die()
        assert run.check() == number


@pytest.mark.parametrize(
    ("uses_manager", "error"),
    daily(
        [*itertools.product([False, True], [errno.EIO, errno.ENOSPC])],
        (False, errno.EIO),
        (True, errno.ENOSPC),
    ),
)
def test_an_error_at_any_operation_is_raised_and_keeps_the_previous_checkpoint(
    tmp_path, uses_manager, error
):
    run = Run(tmp_path / "a" / "b", uses_manager)
    run.save()
    for number in range(1, 200):
        expected = run.number + 1
        with faults.injected(faults.Faults(fail_at=number, error=error)) as broken:
            try:
                run.save()
            except CheckpointError:
                expected -= 1
        assert run.check() == expected
        run.save()  # the run can go on
        assert run.check() == run.number
        if broken.count < number:
            break
    else:
        pytest.fail("a save has fewer operations")


def test_a_full_disk(tmp_path):
    run = Run(tmp_path / "c")
    run.save()
    for room in (0, 100, 1000, 3000):
        with (
            faults.injected(faults.Faults(room=room)),
            pytest.raises(CheckpointError, match="No space left"),
        ):
            run.save()
        assert run.check() == 1
        assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("most", [1, 7, 100])
def test_short_reads_and_writes(tmp_path, most):
    run = Run(tmp_path / "c")
    with faults.injected(faults.Faults(most_at_once=most)):
        run.save()
        assert run.check() == 1
    assert run.check() == 1


def test_an_error_during_verification_changes_nothing(tmp_path):
    run = Run(tmp_path / "c")
    run.save()
    found = run.fresh()
    checkpoint = dv.Checkpoint(**found)
    with faults.injected(faults.Faults()) as counting:
        checkpoint.restore(tmp_path / "c")
    num_reads = counting.calls.count("read")
    for number in range(1, num_reads + 1):
        found = run.fresh()
        with (
            faults.injected(faults.Faults(fail_at=number, counted={"read"})),
            pytest.raises(CheckpointDamagedError) as raised,
        ):
            dv.Checkpoint(**found).restore(tmp_path / "c")
        # Each tensor is read twice; an error of the second reading names the arrays.
        is_untouched = (found["weight"].numpy() == 0).all() and (found["other"] == 0).all()
        if number <= num_reads - 2:
            assert is_untouched
        else:
            assert "must be restored again" in "".join(raised.value.__notes__)
        assert found["data"]["number"] == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "exchange"])
def test_a_damaged_shard_changes_no_object(tmp_path, damage):
    run = Run(tmp_path / "c")
    run.save()
    shard = tmp_path / "c" / "shard-00000.safetensors"
    nbytes = shard.stat().st_size
    if damage == "flip":
        faults.flip_bit(shard, 8 * (nbytes - 1))
    elif damage == "truncate":
        faults.truncate(shard, nbytes - 1)
    elif damage == "remove":
        shard.unlink()
    else:
        other = Run(tmp_path / "d")
        other.number = 5
        other.save()
        os.replace(tmp_path / "d" / "shard-00000.safetensors", shard)
    found = run.fresh()
    rng = found["rng"] = np.random.default_rng(0)
    state = rng.bit_generator.state
    with pytest.raises(CheckpointDamagedError, match="shard-00000"):
        dv.Checkpoint(**found).restore(tmp_path / "c", partial=True)
    assert (found["weight"].numpy() == 0).all()
    assert (found["other"] == 0).all()
    assert found["data"] == {"number": 0}
    assert rng.bit_generator.state == state


def test_a_path_that_is_no_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("c", "file"):
        with pytest.raises(CheckpointError):
            dv.Checkpoint(x=1).save(tmp_path / name)
    assert (tmp_path / "c" / "thesis.tex").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["c", "file"]


# -- one writer at a time ------------------------------------------------------------------------

HOLD = """
import sys, time
import dvkernels as dv
from pathlib import Path
from dvkernels.checkpoint.storage import atomic_folder
with atomic_folder.locked_replacement(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_writer_raises_and_names_the_first(tmp_path):
    run = Run(tmp_path / "c")
    run.save()
    with start(HOLD, tmp_path / "c") as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(CheckpointError, match=rf"another writer.*pid {holder.pid} on"):
                run.save()
            assert run.check() == 1  # reading needs no lock
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        run.save()  # the lock of a killed owner is free
        assert run.check() == run.number
    assert os.listdir(tmp_path) == ["c"]


def test_two_writers_in_one_process(tmp_path):
    run, other = Run(tmp_path / "c"), Run(tmp_path / "c")
    is_inside, may_go = threading.Event(), threading.Event()

    class Slow(file_system.FileSystem):
        def sync_folder(self, path):
            is_inside.set()
            assert may_go.wait(60)
            super().sync_folder(path)

    run.save()
    with file_system.using(Slow()):
        thread = threading.Thread(target=run.save)
        thread.start()
        assert is_inside.wait(60)
        with pytest.raises(CheckpointError, match="this process"):
            other.save()
        may_go.set()
        thread.join()
    assert run.check() == 2
    other.save()


SAVE_AND_WAIT = """
import os, sys, threading
import numpy as np
import dvkernels as dv
from dvkernels.checkpoint.storage import file_system

class Stopping(file_system.FileSystem):
    count = 0
    def __getattribute__(self, name):
        operation = object.__getattribute__(self, name)
        if name.startswith("_") or name == "count":
            return operation
        Stopping.count += 1
        if Stopping.count == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        return operation

weight = dv.Variable(np.full(300, 2.0))
with file_system.using(Stopping()):
    dv.Checkpoint(weight=weight, other=np.full((2, 5), 2.0), data={"number": 2}).save(sys.argv[1])
"""


@pytest.mark.parametrize("number", daily([3, 9, 14, 19, 24], 3, 14))
def test_sigkill_at_an_operation(tmp_path, number):
    run = Run(tmp_path / "c")
    run.save()
    with start(SAVE_AND_WAIT, tmp_path / "c", number) as child:
        assert child.wait(100) == -signal.SIGKILL
    assert run.check() in (1, 2)
    run.save()
    assert os.listdir(tmp_path) == ["c"]
