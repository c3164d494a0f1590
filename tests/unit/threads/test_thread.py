"""Start of threads and the latch, under interrupts and without memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dvkernels.threads import thread

needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")


def test_all_run_and_end():
    ran = []
    made = [thread.Thread(target=ran.append, args=(k,)) for k in range(5)]
    made.append(threading.Thread(target=ran.append, args=(5,)))
    assert not any(one.is_gone() for one in made[:5])
    thread.start(made)
    for one in made:
        one.join(5)
    assert sorted(ran) == list(range(6))
    assert all(one.is_gone() for one in made[:5])


def test_a_thread_that_cannot_start_raises():
    made = thread.Thread(target=int)
    thread.start([made])
    made.join(5)
    with pytest.raises(RuntimeError, match="once"):
        thread.start([made])


@pytest.mark.parametrize("kind", [thread.Thread, threading.Thread])
def test_a_thread_that_dies_before_it_begins_raises(kind, monkeypatch):
    """As without memory: it refers to its function, never runs it, and reports nothing."""
    monkeypatch.setattr(thread, "_BEGIN_SECONDS", 1.0)

    class Stillborn(kind):
        def _bootstrap_inner(self):
            pass

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="ended before its first line"):
        thread.start([Stillborn(target=int, daemon=True)])
    assert time.monotonic() - began < 20


STARVED = """
import os, resource, sys, threading, time
from dvkernels.threads.thread import Thread, start
start([Thread(target=int)])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + int(sys.argv[1]), resource.RLIM_INFINITY))
ran, began, outcome = [], time.monotonic(), "started"
made = [Thread(target=ran.append, args=(k,)) for k in range(3)]
try:
    start(made)
except RuntimeError:
    outcome = "refused"
took = time.monotonic() - began
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert took < 10, took
if outcome == "started":
    for one in made:
        one.join(5)
    assert len(ran) == 3
start([Thread(target=int)])
print(outcome)
"""


@needs_limits
def test_without_memory_the_start_raises():
    outcomes = set()
    for extra in (0, 20_000, 60_000, 200_000, 9 << 20, 200 << 20):
        done = subprocess.run(
            [sys.executable, "-c", STARVED, str(extra)],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (extra, done.stderr)
        outcomes.add(done.stdout.strip())
    assert outcomes == {"started", "refused"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
def test_a_latch_is_opened_and_waited_for_through_interrupts():
    latch = thread.Latch()
    assert not latch.wait(0.01)
    opener = threading.Timer(0.1, latch.open)
    opener.start()
    assert latch.wait(5)
    opener.join()
    latch.open()
    assert latch.wait(0)

    def strike(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for _ in range(50):
            latch = thread.Latch()
            waiter = threading.Thread(target=latch.wait)
            waiter.start()
            try:  # armed inside: on a busy machine it strikes before the next line
                signal.setitimer(signal.ITIMER_REAL, 1e-4)
                while True:
                    latch.open()
                    latch.wait()
            except KeyboardInterrupt:
                pass
            latch.open()
            waiter.join(5)
            assert not waiter.is_alive()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
