"""Stoppable threads: they neither abort nor delay the end of the program."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from dvkernels.threads import stoppable_thread
from dvkernels.threads.stoppable_thread import StoppableThread

PROGRAM = """
import atexit, sys, threading, time

ended = []
@atexit.register  # before the library registers anything, so this is called after it
def tell():
    print(*ended)

from dvkernels.threads import stoppable_thread

has_begun = threading.Event()

def obeys(stop):
    has_begun.set()
    stop.wait()
    ended.append("stopped")

def computes(stop):  # Python code that never checks stop
    has_begun.set()
    try:
        while True:
            time.sleep(0.001)
    finally:
        ended.append("interrupted")

def hangs(stop):  # nothing can end a system call
    has_begun.set()
    time.sleep(1000)

def works_on():  # a thread of the user's, which outlives the main thread
    time.sleep(0.3)
    assert not thread.is_stopping

stoppable_thread._GRACE_SECONDS, stoppable_thread._END_SECONDS = 0.2, 1.0
thread = stoppable_thread.StoppableThread(globals()[sys.argv[1]], "one")
thread.start()
has_begun.wait()
threading.Thread(target=works_on).start()
sys.exit(7)
"""


@pytest.mark.parametrize(
    ("work", "ended"), [("obeys", "stopped"), ("computes", "interrupted"), ("hangs", "")]
)
def test_the_end_of_the_program_waits_for_a_limited_time(work, ended):
    command = [sys.executable, "-c", PROGRAM, work]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr, done.stdout.strip()) == (7, "", ended)


def test_stop_ends_the_thread():
    seen = []

    def work(stop):
        seen.append(thread.wait(60))  # not for itself
        stop.wait()

    thread = StoppableThread(work, "one")
    thread.start()
    assert not thread.wait(0.01)
    thread.stop()
    assert thread.wait(60)
    assert seen == [True]


def test_a_thread_that_cannot_start_raises_and_is_forgotten(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    before = stoppable_thread._running.copy()
    with pytest.raises(RuntimeError, match="can't start"):
        StoppableThread(lambda stop: None, "one").start()
    assert stoppable_thread._running == before
