"""Threads come and go with their strategy, through forks, interrupts and failures."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import psutil
import pytest

import dvkernels as dv
from dvkernels.errors import CollectiveTimeoutError, ContextError

DEVICES = ["cpu:0", "cpu:1"]
MIB = 1024 * 1024

needs_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(DEVICES) as strategy:
        yield strategy


def here():
    return dv.get_replica_context()


def total():
    return float(here().all_reduce("sum", np.ones(100))[0])


def replica_threads():
    return [t for t in threading.enumerate() if t.name.startswith("dvkernels-replica")]


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def fail():
    raise ValueError("no")


def use_and_drop():
    strategy = dv.MirroredStrategy(DEVICES)
    with strategy.scope():
        variable = dv.Variable(np.zeros(1000), aggregation="sum")
    strategy.run(lambda: variable.assign_add(np.ones(1000)))
    with pytest.raises(ValueError, match="no"):
        strategy.run(fail)


def test_a_thousand_strategies_leave_no_thread_and_no_memory():
    process = psutil.Process()
    for _ in range(200):
        use_and_drop()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(1000):
        use_and_drop()
    gc.collect()
    assert eventually(lambda: not replica_threads())
    assert process.memory_info().rss - before < 4 * MIB


def test_dropping_it_is_enough_even_after_an_error():
    strategy = dv.MirroredStrategy(DEVICES)
    with pytest.raises(ValueError, match="no"):
        strategy.run(fail)
    gone = weakref.ref(strategy)
    del strategy
    gc.collect()
    assert gone() is None


def test_close(strategy):
    with strategy.scope():
        variable = dv.Variable(1.0)
    strategy.run(total)
    strategy.close()
    strategy.close()
    assert not replica_threads()
    assert float(variable) == 1.0
    with pytest.raises(ContextError, match="closed"):
        strategy.run(total)


def test_replicas_run_at_the_same_time_on_threads_of_their_own(strategy):
    meeting = threading.Barrier(2)

    def meet():
        meeting.wait(10)
        return threading.get_ident()

    first, second = strategy.run(meet), strategy.run(meet)
    assert first.values == second.values
    assert first.on(0) == threading.get_ident() != first.on(1)


def test_one_step_at_a_time_from_several_threads(strategy):
    results, inside = [], []

    def step():
        inside.append(1)
        here().barrier()
        assert len(inside) == 2
        here().barrier()
        inside.pop()
        return total()

    def caller():
        results.extend(strategy.run(step).on(0) for _ in range(50))

    threads = [threading.Thread(target=caller) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2.0] * 200


def test_who_never_comes_is_named(strategy, monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.1")

    def late():
        if here().replica_id_in_sync_group == 1:
            time.sleep(0.4)
        here().barrier()

    with pytest.raises(CollectiveTimeoutError, match=r"replicas \[1\].*test_lifetime.py"):
        strategy.run(late)
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "soon")
    with pytest.raises(ValueError, match="DVKERNELS_TIMEOUT_SECONDS"):
        strategy.run(total)
    monkeypatch.delenv("DVKERNELS_TIMEOUT_SECONDS")
    assert strategy.run(total).values == (2.0, 2.0)


def run_alone(program):
    """Run a program in a process of its own; signals and forks must not reach pytest."""
    prelude = (
        "import os, random, signal, time\nimport numpy as np\nimport dvkernels as dv\n"
        "from dvkernels.errors import ContextError\n"
        "strategy = dv.MirroredStrategy(['cpu:0', 'cpu:1'])\nhere = dv.get_replica_context\n"
        "def rank(): return here().replica_id_in_sync_group\n"
        "def total(): return float(here().all_reduce('sum', np.ones(100))[0])\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + program], capture_output=True, text=True, timeout=60
    )


@needs_posix
def test_a_forked_child_runs_steps_of_its_own():
    done = run_alone("""
assert strategy.run(total).values == (2.0, 2.0)
child = os.fork()
if child == 0:
    os._exit(0 if strategy.run(total).values == (2.0, 2.0) else 1)
assert os.waitpid(child, 0)[1] == 0
assert strategy.run(total).values == (2.0, 2.0)
""")
    assert done.returncode == 0, done.stderr


@needs_posix
def test_a_fork_inside_a_step_has_no_company():
    done = run_alone("""
def step():
    if rank() == 0:
        return 0
    child = os.fork()
    if child == 0:
        try:
            here().barrier()
        except ContextError:
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1]
assert strategy.run(step).values == (0, 0)
""")
    assert done.returncode == 0, done.stderr


@needs_posix
def test_an_interrupt_ends_collectives_and_waits_for_user_code():
    done = run_alone("""
def step():
    if rank() == 1:
        time.sleep(1)
    here().barrier()
strategy.run(total)
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
began = time.monotonic()
try:
    strategy.run(step)
    raise SystemExit("not interrupted")
except KeyboardInterrupt:
    assert 0.9 < time.monotonic() - began < 2, time.monotonic() - began
assert strategy.run(total).values == (2.0, 2.0)
""")
    assert done.returncode == 0, done.stderr


@needs_posix
def test_interrupts_at_any_moment_leave_all_copies_written_or_none():
    done = run_alone("""
with strategy.scope():
    variable = dv.Variable(np.zeros(1 << 18, np.float32), aggregation='sum')
ones = np.ones(1 << 18, np.float32)
def step():
    variable.assign_add(ones)
strategy.run(step)
signal.signal(signal.SIGALRM, signal.default_int_handler)
random.seed(1)
for _ in range(150):
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 4e-3))
    try:
        while True:
            strategy.run(step)
    except KeyboardInterrupt:
        pass
    first, second = variable.values
    assert first[0] % 2 == 0
    assert (first == first[0]).all() and (second == first[0]).all()
print('done')
""")
    assert done.stdout == "done\n", done.stderr


@needs_posix
def test_the_signal_module_is_left_alone(strategy):
    before = signal.getsignal(signal.SIGINT)
    strategy.run(total)
    assert signal.getsignal(signal.SIGINT) is before
