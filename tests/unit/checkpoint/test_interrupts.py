"""Ctrl-C at every file operation: a save or restore is complete or has changed nothing."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.checkpoint.storage import file_system


class Interrupting:
    """File system that interrupts the main thread at one operation, in whichever thread it runs."""

    def __init__(self, at):
        self.at = at
        self.count = 0
        self.real = file_system.FileSystem()

    def __getattr__(self, name):
        operation = getattr(self.real, name)

        def act(*arguments):
            self.count += 1
            if self.count == self.at:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.005)
            return operation(*arguments)

        return act


def interrupted_everywhere(act, check):
    """Call ``act`` with an interrupt at each of its operations; ``check`` after each."""
    for number in range(1, 200):
        broken = Interrupting(number)
        was_raised = False
        try:
            with file_system.using(broken):
                act()
                time.sleep(0.001)
        except KeyboardInterrupt:
            was_raised = True
        check()
        if broken.count < number:
            return
        assert was_raised
    pytest.fail("it has fewer operations")


@pytest.fixture
def objects():
    return {
        "one": dv.Variable(np.zeros(200_000)),
        "two": np.zeros(300_000),
        "data": {"number": 0},
        "rng": np.random.Generator(np.random.MT19937(0)),
    }


def fill(objects, number):
    objects["one"].assign(np.full(200_000, float(number)))
    objects["two"][...] = number
    objects["data"]["number"] = number
    objects["rng"].bit_generator.state = np.random.MT19937(number).state


def number_in(objects):
    """Return the number that all objects hold."""
    number = objects["data"]["number"]
    assert (objects["one"].numpy() == number).all()
    assert (objects["two"] == number).all()
    expected = np.random.Generator(np.random.MT19937(number)).random()
    copy = np.random.Generator(np.random.MT19937(99))
    copy.bit_generator.state = objects["rng"].bit_generator.state
    assert copy.random() == expected
    return number


def test_interrupts_of_a_save(tmp_path, objects):
    checkpoint = dv.Checkpoint(**objects)
    numbers = iter(range(1, 1000))

    def save():
        fill(objects, next(numbers))
        checkpoint.save(tmp_path / "c")

    def check():
        last = number_in(objects)
        checkpoint.restore(tmp_path / "c")
        assert last - 1 <= number_in(objects) <= last
        fill(objects, last)
        checkpoint.save(tmp_path / "c")
        assert os.listdir(tmp_path) == ["c"]

    save()
    interrupted_everywhere(save, check)


def test_interrupts_of_a_restore(tmp_path, objects):
    checkpoint = dv.Checkpoint(**objects)
    fill(objects, 1)
    checkpoint.save(tmp_path / "c")
    seen = set()

    def restore():
        fill(objects, 2)
        checkpoint.restore(tmp_path / "c")

    interrupted_everywhere(restore, lambda: seen.add(number_in(objects)))
    assert seen == {1, 2}  # interrupts before any object changed, and after all had
