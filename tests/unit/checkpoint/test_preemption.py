"""Preemption signals: the run saves its current step and exits."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import dvkernels as dv

SMALL_RUN = str(Path(__file__).with_name("small_run.py"))
STOPS = [signal.SIGTERM, signal.SIGUSR1]


class Saves:
    def __init__(self, failure=None):
        self.calls, self.failure = [], failure

    def save(self, step):
        self.calls.append(("save", step))
        if self.failure is not None:
            raise self.failure

    def close(self):
        self.calls.append(("close",))


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_saves_the_step_and_exits(number):
    manager, before = Saves(), signal.getsignal(number)
    with dv.PreemptionHandler(manager, exit_code=7) as preemption:
        preemption.after_step(1)
        assert not preemption.is_requested
        signal.raise_signal(number)
        assert preemption.is_requested
        assert not manager.calls  # nothing is interrupted
        with pytest.raises(SystemExit) as end:
            preemption.after_step(2)
    assert end.value.code == 7
    assert manager.calls == [("save", 2), ("close",)]
    assert signal.getsignal(number) is before


def test_all_processes_stop_after_a_signal_to_one():
    manager = Saves()
    preemption = dv.PreemptionHandler(manager, agree=lambda own: True)
    with preemption, pytest.raises(SystemExit) as end:
        preemption.after_step(3)
    assert (end.value.code, manager.calls) == (42, [("save", 3), ("close",)])


def test_a_save_that_fails_does_not_exit():
    manager = Saves(OSError("disk full"))
    with dv.PreemptionHandler(manager) as preemption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(OSError, match="disk full"):
            preemption.after_step(1)


def test_only_the_main_thread_can_take_signals():
    caught = []

    def enter():
        try:
            with dv.PreemptionHandler(Saves()):
                pass
        except dv.errors.ContextError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_a_handler_that_was_not_exited_is_gone_with_its_object():
    """An interrupt may come before the first line of ``__exit__``."""
    before = [signal.getsignal(number) for number in STOPS]
    handler = dv.PreemptionHandler(Saves()).__enter__()
    assert [signal.getsignal(number) for number in STOPS] != before
    del handler
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_handler_dropped_by_another_thread_passes_signals_on():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append("previous"))
    try:
        handlers = [dv.PreemptionHandler(Saves(), signals="SIGUSR1").__enter__()]
        thread = threading.Thread(target=handlers.clear)
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGUSR1)
        assert received == ["previous"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_only_the_main_thread_can_restore_signals():
    handler, caught = dv.PreemptionHandler(Saves()).__enter__(), []

    def leave():
        try:
            handler.__exit__(None, None, None)
        except dv.errors.ContextError as error:
            caught.append(str(error))

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join(10)
    assert "main thread" in caught[0]
    handler.__exit__(None, None, None)


@pytest.mark.parametrize(
    "bad", [{"exit_code": 256}, {"exit_code": True}, {"exit_code": "1"}, {"signals": [15]}]
)
def test_bad_input(bad):
    with pytest.raises(ValueError, match="PreemptionHandler: expected"):
        dv.PreemptionHandler(Saves(), **bad)


@pytest.mark.parametrize("stops", [STOPS[:1], pytest.param(STOPS, marks=pytest.mark.wide)])
def test_a_preempted_run_resumes_where_it_stopped(tmp_path, stops):
    def run(folder, steps, stop=None):
        command = [sys.executable, SMALL_RUN, str(tmp_path / folder), str(steps), "--pause", "0.01"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
            lines = []
            for line in program.stdout:
                lines.append(line)
                if stop is not None and len(lines) == 3:
                    os.kill(program.pid, stop)
        return program.returncode, lines

    _, whole = run("whole", 40)
    for number in stops:  # the second run resumes the first
        code, lines = run("preempted", 40, number)
        assert code == 42, lines
        assert not any(line.startswith("result") for line in lines)
    last = int(lines[-1].split()[1])
    code, lines = run("preempted", 40)
    assert (code, lines[0]) == (0, f"step {last + 1}\n")
    assert lines[-1] == whole[-1]
