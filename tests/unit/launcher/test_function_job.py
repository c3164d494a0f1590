"""Functions launched in several processes: results, errors, interrupts, and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import psutil
import pytest

import dvkernels as dv
from dvkernels.errors import LaunchError, WorkerLostError
from dvkernels.launcher import shared_pickle

pytestmark = pytest.mark.skipif(os.name != "posix", reason="launch is for POSIX")


def workers_of(process):
    return [
        child
        for child in process.children(recursive=True)
        if any("function_worker" in word for word in child.cmdline())
    ]


@pytest.fixture(autouse=True)
def no_worker_is_left():
    yield
    assert not workers_of(psutil.Process())


def test_results_come_in_order_and_arrays_are_sent_once(capfd):
    numbers = np.arange(100_000.0)

    def total(array, *, scale):
        print("one", "line")
        array[0] = 7  # nobody else sees it
        return os.getpid(), scale * array.sum(), array[:2]

    before = numbers.copy()
    results = dv.launch(total, (numbers,), {"scale": 2}, workers=3)
    assert len({pid for pid, _, _ in results} | {os.getpid()}) == 4
    assert [value for _, value, _ in results] == [2 * (before.sum() + 7)] * 3
    assert all(part.tolist() == [7, 1] for _, _, part in results)
    assert (numbers == before).all()
    assert sorted(capfd.readouterr().out.splitlines()) == [f"[{k}] one line" for k in range(3)]


def test_a_large_array_is_mapped_and_half_a_value_is_none():
    fd = shared_pickle.new_file()
    with pytest.raises(EOFError):
        shared_pickle.read(fd)
    array = np.random.default_rng(1).random((300, 400))
    shared_pickle.write(fd, {"a": array, "small": np.ones(3)})
    assert os.fstat(fd).st_size < array.nbytes + 5000
    first, second = shared_pickle.read(fd), shared_pickle.read(fd)
    first["a"][:] = 0
    assert (second["a"] == array).all()
    os.pwrite(fd, bytes(8), 0)  # as if the writer had been killed
    with pytest.raises(EOFError):
        shared_pickle.read(fd)
    os.ftruncate(fd, 5)
    with pytest.raises(EOFError):
        shared_pickle.read(fd)
    os.close(fd)


class TwoArguments(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def fail(how):
    def interrupt_me():
        raise ValueError("my message")

    match how:
        case "raise":
            interrupt_me()
        case "custom":
            raise TwoArguments(1, 2)  # which cannot be unpickled
        case "exit":
            sys.exit(3)
        case "vanish":
            os._exit(4)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "generator":
            return (x for x in ())
    return None


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("raise", ValueError, "my message"),
        pytest.param("custom", LaunchError, "cannot be pickled", marks=pytest.mark.wide),
        pytest.param("exit", LaunchError, r"sys\.exit\(3\)", marks=pytest.mark.wide),
        pytest.param(
            "vanish", WorkerLostError, "worker 0 ended with status 4", marks=pytest.mark.wide
        ),
        ("kill", WorkerLostError, "worker 0 was killed by SIGKILL"),
        pytest.param(
            "generator",
            LaunchError,
            "the result of the function cannot be pickled",
            marks=pytest.mark.wide,
        ),
    ],
)
def test_a_failure_is_told_as_it_is(how, error, words):
    with pytest.raises(error, match=words) as caught:
        dv.launch(fail, (how,), workers=1)
    if how in ("raise", "custom"):
        (note,) = caught.value.__notes__
        assert note.startswith("In worker 0:\nTraceback")
        assert f'File "{__file__}"' in note
        assert "function_worker" not in note


def test_the_first_error_counts_and_the_others_clean_up(tmp_path):
    def step():

        try:
            os.mkdir(tmp_path / "first")
        except FileExistsError:
            try:
                time.sleep(60)
            finally:
                (tmp_path / "cleaned").touch()
        while len(os.listdir(tmp_path)) < 1:
            time.sleep(0.01)
        raise KeyError("first")

    started = time.monotonic()
    with pytest.raises(KeyError, match="first"):
        dv.launch(step, workers=2)
    assert time.monotonic() - started < 30
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3,), "expected a function; got 3"),
        ((len, 3), r"args: expected a tuple of arguments; got 3; write args=\(value,\)"),
        ((len, (), 3), "kwargs: expected a mapping of names; got 3"),
        ((len, ((x for x in ()),)), "arguments cannot be pickled: TypeError"),
    ],
)
def test_what_cannot_be_called_is_refused(arguments, words):
    with pytest.raises(LaunchError, match=words):
        dv.launch(*arguments, workers=1)


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "2"])
def test_a_number_of_workers_is_from_1(workers):
    with pytest.raises(LaunchError, match="workers: expected a number of processes from 1"):
        dv.launch(len, workers=workers)


SCRIPT = """
import os, subprocess, time
import dvkernels as dv
def wait():
    child = subprocess.Popen(["sleep", "100"])
    print("started", child.pid)
    time.sleep(100)
dv.launch(wait, workers=2)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.wide)]
)
def test_workers_end_with_a_script_without_a_main_guard(number):
    script = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = [script.stdout.readline() for _ in range(2)]
    assert sorted(line[:11] for line in started) == ["[0] started", "[1] started"]
    below = psutil.Process(script.pid).children(recursive=True)
    assert len(below) == 4
    script.send_signal(number)
    script.communicate(timeout=60)
    assert script.returncode == -number
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive
