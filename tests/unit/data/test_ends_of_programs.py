"""A program ends with its own exit status, whatever threads of its datasets still run."""

from __future__ import annotations

import fork_server
import pytest

# Elements pass through optree's C++ code, in which no thread may be when the interpreter ends.
PROGRAM = """
import signal, sys, tempfile, threading, time
import numpy as np
import dvkernels as dv

def decode(i):
    return {"x": np.full(8, float(i)), "y": [int(i) % 10] * 50}

strategy = dv.MirroredStrategy(["cpu:0", "cpu:1"])
data = dv.Dataset.range(10**7)
if HOW == "sequential":
    data = data.filter(lambda x: True)
if HOW == "threads":
    data = data.map(decode, num_workers=2).batch(256)
elif HOW == "a long element":
    data = data.map(decode).batch(10**6).prefetch(2)
else:
    data = data.map(decode).batch(256).prefetch(16)
iterator = iter(data if HOW == "a long element" else strategy.distribute_dataset(data))
if HOW == "a long element":
    thread = threading.Thread(target=next, args=[iterator], daemon=True)
    thread.start()
    time.sleep(0.3)  # the element is being computed
    sys.exit(42)
if HOW == "preempted":
    manager = dv.CheckpointManager(dv.Checkpoint(w=dv.Variable(0.0)), tempfile.mkdtemp())
    with manager, dv.PreemptionHandler(manager) as preemption:
        for step, batch in enumerate(iterator, 1):
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            preemption.after_step(step)
for step, batch in enumerate(iterator):
    if step == 3:
        break
if HOW == "error":
    raise ValueError("the user's own")
if HOW == "dropped":
    del iterator
if HOW == "another thread":
    def work():
        for step, batch in enumerate(iterator):
            if step == 50:
                return
    threading.Thread(target=work).start()
sys.exit(42)
"""


@pytest.mark.parametrize(
    "how",
    [
        "kept",
        "dropped",
        "sequential",
        "threads",
        "error",
        "preempted",
        "another thread",
        "a long element",
    ],
)
@pytest.mark.parametrize("num_runs", [1, pytest.param(3, marks=pytest.mark.wide)])
def test_the_exit_status_is_that_of_the_program(how, num_runs):
    for _ in range(num_runs):  # a regression aborted in more than half of the runs
        done = fork_server.run(f"HOW = {how!r}\n{PROGRAM}", timeout=60)
        assert done.returncode == (1 if how == "error" else 42), done.stderr
        if how != "error":
            assert done.stderr == ""
