"""Ctrl-C at every point of a step: no hang, no broken state, and the process ends."""

from __future__ import annotations

import os

import interrupt_points
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")

# Copies are all written or none; the next step works, in this thread and in another.
PROGRAM = """
import sys
import threading
import numpy as np
import dvkernels as dv

SIZE = {size}
here = dv.get_replica_context

def step_of(kind, variable, optimizer):
    ones = np.ones(3)
    return {{
        "nothing": lambda: None,
        "all_reduce": lambda: here().all_reduce("sum", ones)[0],
        "async": lambda: here().all_reduce_async("sum", ones).wait()[0],
        "async unawaited": lambda: here().all_reduce_async("sum", ones) and None,
        "async twice": lambda: [
            handle.wait()[0]
            for handle in [here().all_reduce_async("sum", one) for one in (ones, 2 * ones)]
        ],
        "merge_call": lambda: here().merge_call(lambda own, x: own.reduce("sum", x), (1.0,)),
        "barrier": lambda: here().barrier(),
        "write": lambda: variable.assign_add(ones),
        "optimizer": lambda: optimizer.apply_gradients([(ones, variable)]),
        "dies": lambda: {{}}[1],
    }}[kind]

def make():
    strategy = dv.MirroredStrategy([f"cpu:{{k}}" for k in range(SIZE)])
    with strategy.scope():
        variable = dv.Variable(np.zeros(3), aggregation="sum")
    optimizer = dv.optimizers.SGD(0.5, momentum=0.5)
    step = step_of({kind!r}, variable, optimizer)
    if {is_warm}:
        strategy.run(total)
        if {kind!r} != "dies":
            strategy.run(step)

    def act():
        try:
            strategy.run(step)
        except KeyError:
            pass

    def check(was_raised):
        first, *others = variable.values
        assert all((first == other).all() for other in others), variable.values
        assert strategy.run(total).values == (SIZE,) * SIZE
        found = []
        thread = threading.Thread(target=lambda: found.append(strategy.run(total).values))
        thread.start()
        thread.join(5)
        assert found == [(SIZE,) * SIZE], "another thread never had its turn"
        before = variable.values[0].copy()
        strategy.run(lambda: variable.assign_add(np.ones(3)))
        assert all((copy == before + SIZE).all() for copy in variable.values)
        strategy.close()
        for left in threading.enumerate():
            if left.name.startswith("dvkernels-replica") and left.ident in sys._current_frames():
                left.join(5)
                assert not left.is_alive(), left
    return act, check

def total():
    return float(here().all_reduce("sum", np.ones(3))[0])

for kind in ("nothing", "all_reduce", "async", "merge_call", "write", "optimizer"):
    with dv.MirroredStrategy([f"cpu:{{k}}" for k in range(SIZE)]) as first:
        with first.scope():
            variable = dv.Variable(np.zeros(3), aggregation="sum")
        first.run(step_of(kind, variable, dv.optimizers.SGD(0.5, momentum=0.5)))
"""

KINDS = [
    "nothing",
    "all_reduce",
    "async",
    "async unawaited",
    "async twice",
    "merge_call",
    "barrier",
    "write",
    "optimizer",
    "dies",
]


def program(kind: str, size: int, is_warm: bool = True) -> str:
    return PROGRAM.format(kind=kind, size=size, is_warm=is_warm)


@pytest.mark.parametrize("sample", [12, pytest.param(30, marks=pytest.mark.wide)])
@pytest.mark.parametrize("kind", ["async", "write"])
def test_interrupts_at_some_points(kind, sample):
    broken = interrupt_points.broken_in(program(kind, 2), sample=sample)
    assert not broken, broken.text()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupts_at_every_point_of_a_step(kind, size):
    # A replica's own error may replace the interrupt, because it ended the step as well.
    broken = interrupt_points.broken_in(program(kind, size), may_be_lost=kind == "dies")
    print(f"{kind}, {size} replicas: {broken.num_struck} points")
    assert not broken, broken.text()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_interrupts_at_every_point_of_the_first_step(size):
    broken = interrupt_points.broken_in(program("async", size, is_warm=False))
    assert not broken, broken.text()


# A worker is interrupted in a collective and announces it as a step does; another thread continues.
BETWEEN_WORKERS = """
import threading
import numpy as np
import dvkernels as dv
from dvkernels.reduce_op import ReduceOp
from threads_as_workers import WorkerGroup, at_once, transports

def groups():
    return [WorkerGroup(transport) for transport in transports(2, timeout_seconds=2)]

def reduced(worker):
    return float(worker.reduce([np.ones(3)], ReduceOp.SUM)[0])

at_once(*[lambda w=w: reduced(w) for w in groups()])

def make():
    one, other = groups()
    found = []
    beside = threading.Thread(target=lambda: found.extend(at_once(lambda: reduced(other))))
    beside.start()

    def act():
        reduced(one)

    def check(was_raised):
        if was_raised:
            one.announce(KeyboardInterrupt())
        tries = 0
        while (outcomes := at_once(lambda: reduced(one), lambda: reduced(other))) != [2.0, 2.0]:
            assert all(isinstance(e, (float, dv.errors.DvKernelsError)) for e in outcomes), outcomes
            waited = [e for e in outcomes if isinstance(e, dv.errors.CollectiveTimeoutError)]
            assert not any("another thread of worker" in str(e) for e in waited), outcomes
            tries += 1
            if one.has_ended:  # interrupted in the middle: the group has ended for both
                assert other.has_ended
                break
            assert tries < 5, outcomes
        beside.join(10)
        assert not beside.is_alive()
        assert found[0] == 2.0 or isinstance(found[0], dv.errors.DvKernelsError), found
    return act, check
"""


def test_interrupts_at_some_points_of_a_collective_between_workers():
    broken = interrupt_points.broken_in(BETWEEN_WORKERS, sample=15)
    assert not broken, broken.text()


@pytest.mark.slow
def test_interrupts_at_every_point_of_a_collective_between_workers():
    broken = interrupt_points.broken_in(BETWEEN_WORKERS)
    assert not broken, broken.text()
