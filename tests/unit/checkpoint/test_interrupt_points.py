"""Ctrl-C at every point of the main thread: objects stay consistent, and later calls work.

By default a sample of the points; all of them with ``-m slow``.
"""

from __future__ import annotations

import interrupt_points
import pytest

TOP = """
import contextlib, os, tempfile
import numpy as np
import dvkernels as dv

def objects(number):
    return dict(
        weight=dv.Variable(np.full(50, float(number))), other=np.full(3, float(number)),
        data={"number": number}, some=[number], pair=(number, number),
        rng=np.random.Generator(np.random.MT19937(number)),
    )

def numbers(checkpoint):
    "Return the numbers that the objects hold."
    held = checkpoint.objects
    draws = {n: np.random.Generator(np.random.MT19937(n)).bit_generator.state for n in (1, 2, 3)}
    (drawn,) = (n for n in draws if repr(draws[n]) == repr(held["rng"].bit_generator.state))
    return {
        *held["weight"].numpy(), *held["other"], held["data"]["number"], *held["some"],
        *held["pair"], drawn,
    }

def prepare():
    "Return a checkpoint of objects that hold 2, and a path where 1 is saved."
    path = tempfile.mkdtemp() + "/run"
    dv.Checkpoint(**objects(1)).save(path)
    return dv.Checkpoint(**objects(2)), path

def look(checkpoint, path, allowed):
    "The checkpoint is whole, and the next save and restore work."
    found = dv.Checkpoint(**objects(3))
    found.restore(path)
    (number,) = numbers(found)
    assert number in allowed, number
    checkpoint.objects.update(objects(3))
    with contextlib.suppress(dv.errors.CheckpointError):
        checkpoint.close()
    checkpoint.save(path)
    checkpoint.save(path, background=True)
    checkpoint.close()
    found.restore(path)
    assert numbers(found) == {3}
    assert os.listdir(os.path.dirname(path)) == ["run"], os.listdir(os.path.dirname(path))

with dv.Checkpoint(x=1) as warm:
    warm.save(tempfile.mkdtemp() + "/run", background=True)
"""

PROGRAMS = {
    "save": """
def make():
    checkpoint, path = prepare()
    return lambda: checkpoint.save(path), lambda was_raised: look(checkpoint, path, {1, 2})
""",
    "restore": """
def make():
    checkpoint, path = prepare()
    def check(was_raised):
        (number,) = numbers(checkpoint)
        assert number == 1 or was_raised
        look(checkpoint, path, {1})
    return lambda: checkpoint.restore(path), check
""",
    "background": """
def make():
    checkpoint, path = prepare()
    def act():
        checkpoint.save(path, background=True)
    return act, lambda was_raised: look(checkpoint, path, {1, 2})
""",
    "close": """
def make():
    checkpoint, path = prepare()
    def act():
        checkpoint.save(path, background=True)
        checkpoint.close()
    return act, lambda was_raised: look(checkpoint, path, {1, 2})
""",
    "the end of the program": """
def make():
    checkpoint, path = prepare()
    def act():
        with checkpoint:
            checkpoint.save(path, background=True)
    return act, lambda was_raised: checkpoint.save(path, background=True)
""",
    "a folder of a manager": """
def make():
    folder = tempfile.mkdtemp()
    checkpoint = dv.Checkpoint(**objects(1))
    manager = dv.CheckpointManager(checkpoint, folder, 2)
    for step in (1, 2, 3):
        manager.save(step)
    def act():
        manager.restore(2)
        manager.save(4, background=True)
        manager.restore_latest()
        manager.save(5)
    def check(was_raised):
        manager.close()  # its thread may still write
        assert numbers(checkpoint) == {1}
        again = dv.CheckpointManager(checkpoint, folder, 2)
        there = [int(path.name[5:]) for path in again.checkpoints]
        assert there in ([2, 3], [2, 3, 4], [2, 4], [2, 4, 5], [4, 5], [3, 4]), there
        again.restore_latest()
        again.save(6)
        assert len(os.listdir(folder)) == 2
    return act, check
""",
    "preemption": """
import signal
def make():
    folder = tempfile.mkdtemp()
    manager = dv.CheckpointManager(dv.Checkpoint(**objects(1)), folder)
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    manager.save(1)
    def act():
        try:
            with dv.PreemptionHandler(manager) as handler:
                handler.after_step(2)
                signal.raise_signal(signal.SIGTERM)
                handler.after_step(3)
        except SystemExit:
            pass
    def check(was_raised):
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
        found = dv.Checkpoint(**objects(3))
        assert dv.CheckpointManager(found, folder).restore_latest().step in (1, 3)
        manager.save(4)
    return act, check
""",
}


@pytest.mark.parametrize("what", PROGRAMS)
@pytest.mark.parametrize(
    "sample", [6, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_the_next_save_and_restore_work(what, sample):
    broken = interrupt_points.broken_in(TOP + PROGRAMS[what], sample=sample)
    print(f"{what}: {broken.num_struck} of {broken.num_points} points, "
          f"{broken.slowest_seconds:.1f} s")  # fmt: skip
    assert not broken, broken.text()
    assert broken.num_struck > 5
