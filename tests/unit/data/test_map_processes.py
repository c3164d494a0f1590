"""Worker processes of map: their errors, their failures and their end."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import dvkernels as dv
from dvkernels.data import worker_process
from dvkernels.data.cursor import EpochPosition
from dvkernels.data.dataset import Dataset
from dvkernels.errors import DatasetError, WorkerLostError

ROOT = Path(dv.__file__).parent.parent


class Picky(Exception):
    """An exception that cannot be rebuilt from its arguments."""

    def __init__(self, left, right):
        super().__init__(f"{left} and {right}")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


ERRORS = {
    1: lambda: KeyError("plain"),
    2: lambda: Picky("sand", "sea"),
    3: lambda: Frozen(7),
    4: lambda: Mute(),
    5: lambda: OSError(28, "No space left"),
}


def fail(x):
    raise ERRORS[int(x)]()


def leave(x):
    sys.exit(int(x))


def give_a_lock(x):
    return threading.Lock() if x == 1 else x


def stop_at_five(x):
    if x == 5:
        os.kill(os.getpid(), signal.SIGSTOP)
    return x


def think(x):
    time.sleep(0.6)
    return x


def own_process(x):
    return os.getpid()


def status_of_a_terminated_child(x):
    child = subprocess.Popen(["sleep", "60"])
    child.terminate()
    return child.wait()


def mapped(fn, elements, **options):
    data = Dataset.from_sequence(elements).map(fn, num_workers=2, workers="processes")
    return iter(data.batch(2, **options))


@pytest.mark.parametrize("which", [1, 4, 5])
def test_a_picklable_error_is_raised_as_it_is(which):
    want = ERRORS[which]()
    with pytest.raises(type(want)) as caught:
        next(mapped(fail, [which] * 2))
    assert caught.value.args == want.args
    assert any("in fail" in note for note in caught.value.__notes__)  # its traceback


@pytest.mark.parametrize(("which", "words"), [(2, "Picky: sand and sea"), (3, "Frozen: 7")])
def test_an_error_that_cannot_be_pickled_is_described(which, words):
    with pytest.raises(RuntimeError, match=words) as caught:
        next(mapped(fail, [which] * 2))
    assert "in fail" in str(caught.value)


@pytest.mark.parametrize("which", ERRORS)
def test_worker_threads_raise_the_very_error(which):
    raised = []

    def fn(x):
        raised.append(ERRORS[which]())
        raise raised[0]

    with pytest.raises(type(ERRORS[which]())) as caught:
        next(iter(Dataset.range(2).map(fn, num_workers=1).batch(2)))
    assert caught.value in raised


def test_system_exit_in_a_worker_process_is_raised():
    with pytest.raises(SystemExit) as caught:
        next(mapped(leave, [3, 3]))
    assert caught.value.code == 3


def test_results_that_cannot_be_pickled_are_named():
    iterator = mapped(give_a_lock, [0, 1, 2, 3])
    with pytest.raises(DatasetError, match=r"got a lock, which cannot be pickled"):
        next(iterator)
    with pytest.raises(DatasetError, match="elements that can be sent to a worker process"):
        next(mapped(abs, [threading.Lock()] * 2))


def test_a_stopped_process_is_replaced_after_the_timeout(monkeypatch):
    iterator = mapped(stop_at_five, range(8))
    assert [next(iterator).tolist(), next(iterator).tolist()] == [[0, 1], [2, 3]]
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "1")
    with pytest.raises(WorkerLostError, match=r"not answered for 1 s.*DVKERNELS_TIMEOUT_SECONDS"):
        next(iterator)
    monkeypatch.delenv("DVKERNELS_TIMEOUT_SECONDS")
    iterator.move_to(EpochPosition(0, 3))
    assert next(iterator).tolist() == [6, 7]
    iterator.close()


@pytest.mark.slow
def test_heartbeats_extend_the_timeout_of_a_busy_process(monkeypatch):
    data = Dataset.range(16).map(think, num_workers=2, workers="processes").batch(8)
    iterator = iter(data)
    next(iterator)
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "2")  # less than its share takes
    assert next(iterator).tolist() == [*range(8, 16)]
    iterator.close()


def test_worker_processes_ignore_signals_to_the_process_group():
    iterator = mapped(own_process, range(40))
    before = {*next(iterator).tolist(), *next(iterator).tolist()}
    for pid in before:
        for number in worker_process._SIGNALS:
            os.kill(pid, number)
    for _ in range(5):
        assert {*next(iterator).tolist()} <= before
    iterator.close()


def test_child_processes_of_a_function_receive_signals():
    iterator = mapped(status_of_a_terminated_child, range(2))
    assert next(iterator).tolist() == [-signal.SIGTERM] * 2
    iterator.close()


PREEMPTED = """
import os, sys
import dvkernels as dv
if __name__ == "__main__":
    data = dv.Dataset.range(10**6).map(abs, num_workers=2, workers="processes").batch(8)
    with dv.MirroredStrategy(["cpu:0"]) as strategy:
        batches = iter(strategy.distribute_dataset(data))
        manager = dv.CheckpointManager(dv.Checkpoint(batches=batches), "runs")
        with manager, dv.PreemptionHandler(manager) as preemption:
            print("ready", flush=True)
            for step, batch in enumerate(batches, 1):
                preemption.after_step(step)
"""


def start(folder, text, **options):
    (folder / "program.py").write_text(text)
    return subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_costs_no_checkpoint(tmp_path, number):
    with start(tmp_path, PREEMPTED, start_new_session=True) as program:
        assert program.stdout.readline() == "ready\n"
        while not psutil.Process(program.pid).children():
            time.sleep(0.001)
        os.killpg(program.pid, number)  # while the first process is starting
        _, said = program.communicate(timeout=60)
    assert (program.returncode, said) == (42, "")
    assert list((tmp_path / "runs").glob("step-*"))


def test_processes_end_with_a_killed_program_that_has_a_fork(tmp_path):
    text = """
import os, time
import dvkernels as dv
if __name__ == "__main__":
    iterator = iter(dv.Dataset.range(99).map(abs, num_workers=2, workers="processes").batch(4))
    next(iterator)
    if os.fork() == 0:  # the fork keeps the sockets of the processes open
        os.setsid()
        time.sleep(30)
        os._exit(0)
    print("ready", flush=True)
    time.sleep(30)
"""
    with start(tmp_path, text) as program:
        assert program.stdout.readline() == "ready\n"
        family = psutil.Process(program.pid).children()
        serving = [one for one in family if "dvkernels.data.worker_process" in str(one.cmdline())]
        fork = [one for one in family if one not in serving]
        program.kill()
        try:
            assert len(serving) == 2
            assert not psutil.wait_procs(serving, timeout=20)[1]
        finally:
            for one in fork:
                one.kill()


UNGUARDED = """
import dvkernels as dv
def plus_one(x):
    return x + 1
data = dv.Dataset.range(8).map(plus_one, num_workers=2, workers="processes").batch(4)
print([batch.tolist() for batch in data])
"""


@pytest.mark.parametrize("how", ["script", "standard input", "command"])
def test_an_import_failure_is_reported_as_the_cause(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    words = {"script": [str(script)], "standard input": ["-"], "command": ["-c", UNGUARDED]}[how]
    done = subprocess.run(
        [sys.executable, *words],
        input=UNGUARDED,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    *lines, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert "memory" not in done.stderr
    assert done.stderr.count("Traceback") == 1  # no traceback of a worker process
    assert last.startswith("dvkernels.errors.DatasetError: map: expected a function")
    assert "import" in last
    if how == "script":
        assert "__main__" in last
    else:
        # Raised at the line that the user wrote, a few calls below.
        assert sum(line.startswith("  File ") for line in lines) <= 6


@pytest.mark.parametrize("missing", ["files", "threads"])
def test_a_lack_of_resources_is_named(missing, monkeypatch):
    iterator = mapped(abs, range(4))
    if missing == "threads":
        monkeypatch.setattr(threading.Thread, "start", _no_thread)
        with pytest.raises(DatasetError, match=r"start threads .* can't start new thread"):
            next(iterator)
        return
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = min(set(range(len(used) + 1)) - used)  # no file descriptor below the limit is free
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        with pytest.raises(DatasetError, match=r"start a worker process; got OSError.*open files"):
            next(iterator)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert next(iterator).tolist() == [0, 1]
    iterator.close()


def _no_thread(self):
    raise RuntimeError("can't start new thread")


def test_map_works_when_no_thread_can_be_started(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", _no_thread)
    data = Dataset.range(9).map(abs, num_workers=3)
    assert [batch.tolist() for batch in data.batch(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [int(x) for x in Dataset.from_iterable(lambda: range(9)).map(abs, num_workers=3)] == [
        *range(9)
    ]
    with pytest.raises(DatasetError, match=r"prefetch: expected to start a thread.*prefetch=0"):
        next(iter(data.prefetch(2)))
