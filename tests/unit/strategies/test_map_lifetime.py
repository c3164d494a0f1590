"""``strategy.map`` under Ctrl-C, forks, garbage collection and the end of the program."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import weakref

import fork_server
import interrupt_points
import psutil
import pytest

import dvkernels as dv

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")

PRELUDE = """
import itertools, os, signal, sys, threading, time
import dvkernels as dv
from dvkernels.errors import ContextError

def square(x):
    return x * x

def threads():
    return [t for t in threading.enumerate() if "of-map" in t.name]
"""

# Whatever is struck: the results received are the first ones, nothing is left running, and the
# strategy works.
PROGRAM = (
    PRELUDE
    + """
def make():
    strategy = dv.MirroredStrategy({size})
    received = []
    def act():
        {act}
    def check(was_raised):
        assert received == [k * k for k in range(len(received))], received
        assert len(received) == {count} or was_raised
        assert list(strategy.map(square, range(5))) == [0, 1, 4, 9, 16]
        strategy.run(lambda: None)
        strategy.close()
        end = time.monotonic() + 5
        while threads() and time.monotonic() < end:
            time.sleep(0.001)
        assert not threads(), threads()
    return act, check

with dv.MirroredStrategy({size}) as first:
    first.run(lambda: None)
"""
)

ACTS = {
    "list": (6, "received.extend(strategy.map(square, range(6)))"),
    "loop": (6, "for result in strategy.map(square, range(6)): received.append(result)"),
    "close": (
        2,
        "with strategy.map(square, itertools.count()) as results: "
        "received.extend(itertools.islice(results, 2))",
    ),
    "drop": (2, "received.extend(itertools.islice(strategy.map(square, itertools.count()), 2))"),
}


def program(kind: str, size: int) -> str:
    count, act = ACTS[kind]
    return PROGRAM.format(size=size, act=act, count=count)


@pytest.mark.parametrize(("kind", "sample"), [("list", 8), ("close", 4)])
def test_interrupts_at_some_points(kind, sample):
    broken = interrupt_points.broken_in(program(kind, 2), sample=sample)
    assert not broken, broken.text()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ACTS)
def test_interrupts_at_every_point_of_a_map(kind, size):
    broken = interrupt_points.broken_in(program(kind, size))
    print(f"{kind}, {size} replicas: {broken.num_struck} points")
    assert not broken, broken.text()


def run_alone(text):
    return fork_server.run(PRELUDE + text, timeout=60)


def test_ctrl_c_ends_a_wait_at_once_and_the_next_step_works():
    done = run_alone("""
may_end = threading.Event()
strategy = dv.MirroredStrategy(2)
strategy.run(lambda: None)
results = strategy.map(lambda k: k and may_end.wait(30), itertools.count())
assert next(results) == 0
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    next(results)
except KeyboardInterrupt:
    pass
assert not may_end.is_set()
try:
    next(results)
except ContextError as error:
    assert "KeyboardInterrupt ended it" in str(error), error
threading.Timer(0.1, may_end.set).start()
assert strategy.run(may_end.is_set).values == (True, True)
""")
    assert done.returncode == 0, done.stderr


def test_a_forked_child_has_no_part_in_a_map():
    done = run_alone("""
strategy = dv.MirroredStrategy(2)
results = strategy.map(square, itertools.count())
assert next(results) == 0
child = os.fork()
if child == 0:
    try:
        next(results)
    except ContextError as error:
        assert "forked" in str(error)
        assert list(strategy.map(square, range(3))) == [0, 1, 4]
        assert strategy.run(square, (2,)).values == (4, 4)
        del results
        os._exit(17)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
assert next(results) == 1
""")
    assert done.returncode == 0, done.stderr


def test_a_function_may_fork():
    done = run_alone("""
def in_a_child(k):
    child = os.fork()
    if child == 0 and k % 2:
        os._exit(k)
    return child and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

with dv.MirroredStrategy(2) as strategy:
    strategy.run(lambda: None)
    assert list(strategy.map(in_a_child, iter(range(6)))) == [0, 1, 0, 3, 0, 5]
    try:  # the child of the caller's thread goes on with the caller's code
        assert list(strategy.map(in_a_child, range(6)))[1::2] == [1, 3, 5]
    except ContextError as error:
        os._exit("forked from" not in str(error))
print("once")
""")
    assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr


ENDINGS = {
    "sleeps": "lambda k: time.sleep(60)",
    "computes": "lambda k: [0 for _ in iter(int, 1)]",
}


@pytest.mark.parametrize(
    "kind", ["is quick", *(pytest.param(kind, marks=pytest.mark.wide) for kind in ENDINGS)]
)
def test_a_program_ends_with_an_open_map(kind):
    began = time.monotonic()
    done = run_alone(f"""
strategy = dv.MirroredStrategy(2)
results = strategy.map({ENDINGS.get(kind, "square")}, itertools.count())
print("done")
sys.exit(3)
""")
    assert (done.returncode, done.stdout) == (3, "done\n"), done.stderr
    assert time.monotonic() - began < 40


@pytest.mark.wide
def test_the_end_of_a_program_ends_a_blocked_source_and_a_daemon_consumer():
    done = run_alone("""
strategy = dv.MirroredStrategy(2)
never = threading.Event()
def items():
    yield 1
    never.wait()
results = strategy.map(square, items())
consumer = threading.Thread(target=list, args=(results,), daemon=True)
consumer.start()
time.sleep(0.05)
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_maps_leave_no_thread_and_no_memory():
    process = psutil.Process()

    def use_and_drop(strategy):
        assert sum(strategy.map(abs, range(5))) == 10
        next(strategy.map(lambda k: bytearray(10_000), itertools.count()))
        with pytest.raises(ZeroDivisionError):
            list(strategy.map(lambda k: 1 // (k - 3), range(9)))

    with dv.MirroredStrategy(2) as strategy:
        for _ in range(10):
            use_and_drop(strategy)
        gc.collect()
        before = process.memory_info().rss
        for _ in range(60):
            use_and_drop(strategy)
        assert process.memory_info().rss - before < 4 * 1024 * 1024
        strategy.run(lambda: None)
        end = time.monotonic() + 5
        while time.monotonic() < end and [t for t in threading.enumerate() if "of-map" in t.name]:
            time.sleep(0.001)
        assert not [t for t in threading.enumerate() if "of-map" in t.name]


def test_what_a_map_refers_to_is_freed_without_a_collection():
    class Item:
        pass

    def kept(strategy):
        item = Item()
        results = strategy.map(lambda _: item, [item] * 3)
        next(results)
        return weakref.ref(item)

    gc.collect()
    gc.disable()
    try:
        strategy = dv.MirroredStrategy(2)
        ref, strategy_ref = kept(strategy), weakref.ref(strategy)
        del strategy
        end = time.monotonic() + 5
        while time.monotonic() < end and (ref() is not None or strategy_ref() is not None):
            time.sleep(0.001)
        assert ref() is None
        assert strategy_ref() is None
    finally:
        gc.enable()
