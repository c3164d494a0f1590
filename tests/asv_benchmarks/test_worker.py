"""A peer's worker answers within its timeout, or is reported and ended."""

from __future__ import annotations

import os
import sys
import time

import psutil
import pytest
from peers import registry
from peers.worker import Worker

from dvkernels.errors import WorkerLostError

GREETS_THEN_ANSWERS = """
import json, sys
print("welcome to some library")
for line in sys.stdin:
    count = json.loads(line)["count"]
    print(json.dumps({"seconds": count / 2, "wrong": 0, "note": ""}), flush=True)
"""
DIES = "import sys; sys.stdin.readline(); sys.exit('out of luck')"
HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.fixture
def peer(monkeypatch, tmp_path):
    """Return a function that starts a peer whose worker is the given program."""

    def make(program, timeout=20.0):
        script = tmp_path / "worker.py"
        script.write_text(program)
        fake = registry.Peer("x", "x", str(script), False, "")
        monkeypatch.setitem(registry.PEERS, "fake", fake)
        return Worker("fake", sys.executable, 2, timeout_seconds=timeout)

    return make


def test_greetings_before_an_answer_are_skipped(peer):
    with peer(GREETS_THEN_ANSWERS) as worker:
        assert [worker.ask(count, "float32", 1).seconds for count in (2, 8)] == [1, 4]
    assert worker._process.poll() is not None


def test_a_worker_that_dies_is_reported_with_its_last_output(peer):
    with peer(DIES) as worker, pytest.raises(WorkerLostError, match=r"has ended.*out of luck"):
        worker.ask(1, "float32", 1)


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.wide
def test_a_worker_that_hangs_is_ended_with_its_children(peer):
    with peer(HANGS, timeout=1.0) as worker:
        with pytest.raises(WorkerLostError, match="gave no answer in 1 s") as caught:
            worker.ask(1, "float32", 1)
        child = int(str(caught.value).split()[-1])
        worker_pid = worker._process.pid
    end = time.monotonic() + 5
    while any(map(is_running, (child, worker_pid))) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(child)
    assert not is_running(worker_pid)


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_worker_that_cannot_be_started_is_reported():
    with pytest.raises(WorkerLostError, match="cannot be started"):
        Worker("jax", "/nowhere/python", 2)
