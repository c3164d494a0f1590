"""Questions to running jobs: answered while replicas hang, and never in the way."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import fork_server
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.cli import main
from dvkernels.profiler import ask_server, collective_hooks


def ask(*words):
    """Ask this process; return the answer."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main.main(["ask", str(os.getpid()), *words]) == 0
    return output.getvalue()


def ask_until(is_right, *words):
    """Ask until the answer is right: the others may not have come to wait yet."""
    end = time.monotonic() + 60
    while True:
        answer = json.loads(ask("--json", "--watch", "0", *words))
        if is_right(answer) or time.monotonic() > end:
            return answer


def states(answer):
    return sorted((e["replica"], e["state"]) for w in answer["workers"] for e in w["replicas"])


def test_the_replica_that_others_wait_for_is_named():
    answers = []
    data = dv.Dataset.range(12).batch(3).prefetch(1)

    def step():
        replica = dv.get_replica_context()
        replica.all_reduce("sum", np.ones(4))
        if replica.replica_id_in_sync_group == 1:  # late, while it asks
            right = [(0, "waits"), (1, "runs"), (2, "waits")]
            answers.append(ask_until(lambda found: states(found) == right))
            answers.append(ask())
        replica.barrier()

    with dv.MirroredStrategy(["cpu:0"] * 3) as strategy:
        with strategy.scope():
            weight = dv.Variable(np.zeros(1000))
        batches = iter(strategy.distribute_dataset(data))
        next(batches)
        strategy.run(lambda: None)
        strategy.run(step)
        batches.close()
        del weight
    found, text = answers
    (late,) = found["late"]
    assert (late["name"], late["step"]) == ("replica 1 of worker 0", 2)
    assert ".py:" in late["at"]
    (worker,) = found["workers"]
    for each in worker["replicas"]:
        if each["state"] == "waits":
            assert (each["call"], each["replicas"]) == ("barrier()", [1])
            assert each["strategy"].startswith("MirroredStrategy(cpu:0")
    assert any(each["epoch"] == 0 and each["position"] == 1 for each in worker["iterators"])
    assert worker["memory"]["by_device"]["cpu:0"]["variables"] >= 24_000
    stacks = {thread["name"]: "\n".join(thread["stack"]) for thread in worker["threads"]}
    assert "in barrier" in stacks["dvkernels-replica-2"]
    assert "waited for: replica 1 of worker 0" in text
    assert "waits in barrier() for replicas [1]" in text


def test_collectives_are_watched_for_a_while():
    is_over = threading.Event()

    def step():
        while True:
            dv.get_replica_context().barrier()
            if dv.get_replica_context().all_reduce("max", float(is_over.is_set())):
                return

    with dv.MirroredStrategy(["cpu:0"] * 2) as strategy:
        thread = threading.Thread(target=strategy.run, args=(step,))
        thread.start()
        try:
            end, seen = time.monotonic() + 60, []
            while len(seen) < 5 and time.monotonic() < end:
                answer = json.loads(ask("--json", "--watch", "0.1", "--last", "5"))
                seen = answer["workers"][0]["collectives"]
        finally:
            is_over.set()
            thread.join()
    assert len(seen) == 5
    assert {one["call"] for one in seen} <= {"barrier()", "all_reduce(max, float64[])"}
    assert all(one["seconds"] > 0 for one in seen)
    assert collective_hooks.active is None


def late_job():
    """Return the answer that the late replica of the last worker gets."""
    answers = []

    def step():
        replica = dv.get_replica_context()
        replica.barrier()
        if replica.replica_id_in_sync_group == 3:
            right = [(0, "waits for workers"), (1, "performs"), (2, "waits"), (3, "runs")]
            other = [(0, "performs"), (1, "waits for workers"), (2, "waits"), (3, "runs")]
            answers.append(ask_until(lambda found: states(found) in (right, other)))
        replica.barrier()

    with dv.MultiWorkerMirroredStrategy(devices=["cpu:0"] * 2) as strategy:
        strategy.run(step)
    return answers


@pytest.mark.wide
def test_a_late_replica_of_another_worker_is_named():
    _, (answer,) = dv.launch(late_job, workers=2)
    assert [worker["worker"] for worker in answer["workers"]] == [0, 1]
    assert [late["name"] for late in answer["late"]] == ["replica 3 of worker 1"]


HOLDING = """
import ctypes, os, sys
import dvkernels as dv
def step():
    if dv.get_replica_context().replica_id_in_sync_group == 1:
        print(os.getpid(), flush=True)
        ctypes.PyDLL(None).pause()  # with the interpreter's lock
with dv.MirroredStrategy(["cpu:0"] * 2) as strategy:
    strategy.run(step)
"""


@pytest.mark.wide
def test_foreign_code_that_holds_the_lock_is_reported_with_its_stack():
    with subprocess.Popen([sys.executable, "-c", HOLDING], stdout=subprocess.PIPE) as job:
        pid = int(job.stdout.readline())
        try:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                assert main.main(["ask", str(pid), "--json", "--watch", "0"]) == 0
        finally:
            job.send_signal(signal.SIGKILL)
    answer = json.loads(output.getvalue())
    (worker,) = answer["workers"]
    assert "held by foreign code" in worker["lock"]
    assert 'File "<string>", line 7 in step' in worker["stacks"]
    assert answer["late"][0]["pid"] == pid


def test_who_cannot_be_asked_is_told_why(capsys, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert main.main(["ask", str(gone.pid)]) == 2
    assert f"there is no process {gone.pid}" in capsys.readouterr().err
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"DVKERNELS_ASK": "0"}
    ) as silent:
        assert main.main(["ask", str(silent.pid)]) == 2
        silent.communicate(b"\n")
    assert "DVKERNELS_ASK=0 is set" in capsys.readouterr().err


LIFE = """
import os, stat, sys, threading
import dvkernels as dv
from dvkernels.profiler import ask_server
path = ask_server.socket_of(os.getpid(), os.getuid())
def names(): return [thread.name for thread in threading.enumerate()]
dv.OneDeviceStrategy("cpu:0").run(lambda: None)
assert not path.exists() and "dvkernels-ask" not in names()  # nothing to ask
strategy = dv.MirroredStrategy(["cpu:0"] * 2)
strategy.run(lambda: None)
is_on = os.environ.get("DVKERNELS_ASK") != "0"
assert path.exists() == ("dvkernels-ask" in names()) == is_on
if is_on:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
child = os.fork()
if child == 0:
    own = ask_server.socket_of(os.getpid(), os.getuid())
    assert not own.exists() and path.exists() == is_on
    dv.MirroredStrategy(["cpu:0"] * 2).run(lambda: None)
    assert own.exists() == is_on
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
assert path.exists() == is_on
print(path)
"""


@pytest.mark.parametrize("value", ["1", "0"])
def test_the_socket_lives_as_long_as_its_process(value, monkeypatch):
    monkeypatch.setenv("DVKERNELS_ASK", value)
    done = fork_server.run(LIFE)
    done.check_returncode()
    assert not os.path.exists(done.stdout.strip())


def test_a_folder_that_others_may_enter_is_not_used(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="alone may enter"):
        ask_server._open_private_folder(shared)
    private = tmp_path / "private"
    ask_server._open_private_folder(private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    with socket.socket(socket.AF_UNIX) as killed, socket.socket(socket.AF_UNIX) as elsewhere:
        killed.bind(str(private / "999999999.sock"))
        (private / "999999999.stacks").touch()
        elsewhere.bind(str(private / "999999998.sock"))  # of another pid namespace
        elsewhere.listen()
        (private / f"{os.getpid()}.sock").touch()
        ask_server._remove_stale(private)
        assert sorted(os.listdir(private)) == sorted(["999999998.sock", f"{os.getpid()}.sock"])


def num_ask_threads():
    return sum(thread.name == "dvkernels-ask" for thread in threading.enumerate())


def test_a_server_that_cannot_be_reached_is_started_anew():
    def is_asked():
        with dv.MirroredStrategy(["cpu:0"] * 2) as strategy:
            strategy.run(lambda: None)
            return bool(ask("--json", "--watch", "0"))

    assert is_asked()
    os.unlink(ask_server.socket_of(os.getpid(), os.getuid()))
    assert is_asked()
    assert num_ask_threads() == 1


def test_threads_that_begin_at_once_start_one_server():
    path = ask_server.socket_of(os.getpid(), os.getuid())
    begin = threading.Barrier(8)

    def start(_):
        begin.wait(10)
        for _ in range(20):
            ask_server.ensure_running()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            ask_server.ensure_running()
            path.unlink()
            list(pool.map(start, range(8)))
            assert ask("--json", "--watch", "0")
            assert num_ask_threads() == 1


def test_a_server_that_cannot_start_leaves_the_files_of_another_alone():
    ask_server.ensure_running()
    with pytest.raises(OSError, match="in use"):
        ask_server._AskServer()
    assert ask("--json", "--watch", "0")
