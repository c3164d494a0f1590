"""Ctrl-C at points of calls on GPU arrays, over a double of the driver."""

from __future__ import annotations

import interrupt_points
import pytest

PROGRAM = """
import os, threading
from types import SimpleNamespace
import interrupt_points
from driver_double import Array, Gpus
from dvkernels import kernels
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels.cuda.engine import launcher

interrupt_points.OPAQUE = ("driver_double.py",)
gpus = Gpus(SimpleNamespace(setattr=setattr, setitem=dict.__setitem__))
gpus.streams()
library, buffers = gpus.library, [Array(gpus, device) for device in DEVICES]
launch = kernels.CALL
launch()

def make():
    gpus.driver._pid = os.getpid()
    library.current = 1  # the user's

    def check(was_raised):
        assert library.current == 1, "another device is current"
        is_free = []

        def ask():
            is_free.append(launcher.launching.acquire(blocking=False))
            launcher.launching.release()

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert is_free == [True], "the lock of the launches is held"
        before = len(library.launched)
        try:
            launch()
        except CollectiveTimeoutError:
            assert was_raised and before == len(library.launched)
            kernels.cuda.recover()
            launch()
        assert len(library.launched) == before + NUM_LAUNCHES
        if len(set(DEVICES)) > 1:
            assert min(library.epochs[before:]) > max(library.epochs[:before]), "flags are too new"

    return launch, check
"""


@pytest.mark.parametrize(
    ("devices", "call", "num_launches"),
    [
        ([0, 1], "all_reduce(buffers)", 2),
        ([0, 0], "all_gather(buffers, out=[Array(gpus, 0, 80) for _ in range(2)])", 1),
    ],
)
def test_an_interrupted_call_leaves_the_gpus_usable(devices, call, num_launches):
    program = PROGRAM.replace("kernels.CALL", f"lambda: kernels.{call}")
    program = program.replace("NUM_LAUNCHES", str(num_launches)).replace("DEVICES", str(devices))
    broken = interrupt_points.broken_in(program, sample=8)
    assert broken.num_struck > 6
    assert not broken, broken.text()
