"""A job is right when every worker has said so, whatever its launcher believes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dvkernels.launcher.exit_records import ExitRecord, ExitRecords

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the socket is one of Linux")

FORKED = """
if (child := os.fork()) == 0:
    os._exit(7)
os.waitpid(child, 0)
"""
# How a worker ends, and the status that it says; None: it says nothing.
ENDS = {
    "pass": 0,
    "sys.exit()": 0,
    "sys.exit(0)": 0,
    "sys.exit(256)": 0,  # as the system has it
    "sys.exit(3)": 3,
    "sys.exit(-1)": 255,
    "sys.exit('words')": 1,
    "raise ValueError": 1,
    "raise KeyboardInterrupt": 130,
    "os._exit(0)": 0,
    "os._exit(5)": 5,
    "os.execv(sys.executable, [sys.executable, '-c', ''])": 0,
    "os.execlp('true', 'true')": 0,
    "import atexit; atexit.register(os._exit, 6)": 6,
    "import atexit; atexit.register(os.kill, os.getpid(), signal.SIGKILL)": None,
    "import ctypes; ctypes.CDLL(None)._exit(0)": None,
    "os.kill(os.getpid(), signal.SIGKILL)": None,
    "os.kill(os.getpid(), signal.SIGTERM)": None,
    "os.closerange(3, 100)": 0,
    "os.close(2)": 0,
    FORKED: 0,
    "os.fork()": 0,
}


def test_workers_say_how_they_end(tmp_path):
    started = []
    for number, end in enumerate(ENDS):
        ledger = ExitRecords(None)
        program = tmp_path / f"{number}.py"
        program.write_text(f"import os, signal, sys\n{end}")
        told = {"PMI_RANK": "1", "PMI_SIZE": "2", "PYTHONPATH": str(ROOT), **ledger.environ}
        command = [sys.executable, "-m", "dvkernels.launcher.worker", str(program)]
        worker = subprocess.Popen(
            command, env={**os.environ, **told}, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        started.append((ledger, worker))
    found = {}
    for end, (ledger, worker) in zip(ENDS, started, strict=True):
        worker.wait(SECONDS)
        ledger.serve(0, -1)
        found[end] = None if ledger.silent() else ledger.first_failure or 0
        ledger.close()
    assert found == ENDS


# How worker 1 of 2 ends, what the launcher makes of it, and the status of the job.
JOBS = {
    ("os._exit(0)", "0"): 0,
    ("sys.exit(3)", "0"): 3,
    ("raise ValueError", "0"): 1,
    ("sys.exit(2)", "3"): 2,  # MPICH says the bits of all statuses
    ("sys.exit(42)", "137"): 137,  # told to stop, by a launcher that had lost another worker
    ("sys.exit(42)", "0"): 42,
    ("os.kill(os.getpid(), signal.SIGKILL)", "0"): 1,
    ("os.kill(os.getpid(), signal.SIGKILL)", "9"): 9,
}


def test_the_launcher_is_not_believed(start, script):
    program = script("if rank == 1:\n    exec(sys.argv[1])")
    jobs = {job: start("-n", "2", program, job[0], FAKE_STATUS=job[1]) for job in JOBS}
    found = {}
    for (end, said), process in jobs.items():
        _, err = process.communicate(timeout=SECONDS)
        found[end, said] = process.returncode
        assert ("1 ended without a word" in err) == ("kill" in end and said == "0"), err
    assert found == JOBS


def test_the_first_failure_counts(launch, script, tmp_path):
    program = script(
        "mark = 'failed'\n"
        "if rank == 1:\n    os._exit(2 * (open(mark, 'w').close() is None))\n"
        "while not os.path.exists(mark):\n    time.sleep(0.01)\n"
        "time.sleep(0.2)\nos._exit(1)"
    )
    assert launch("-n", "2", program, FAKE_STATUS="3")[0] == 2


def test_a_job_whose_workers_were_killed_is_started_again(launch, script):
    program = script(
        "if os.environ['DVKERNELS_ATTEMPT'] == '0':\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    status, _, err = launch("-n", "2", "--max-restarts", "1", program, FAKE_STATUS="0")
    assert status == 0
    assert "ended without a word" in err
    assert "starting again" in err


@pytest.fixture
def ledger():
    source, target = os.pipe()
    ledger = ExitRecords(source)
    yield ledger
    ledger.close()
    os.close(source)
    os.close(target)


def test_a_ledger_holds_who_is_silent(ledger):
    entries = [ExitRecord(ledger.environ["DVKERNELS_LEDGER"], worker, 4) for worker in range(1, 5)]
    assert ledger.silent() == ""
    for entry in entries[:3]:
        entry.arrive()
    ledger.serve(0, -1)
    assert ledger.silent() == "1, 2, 3 and 1 that never began"
    entries[3].arrive()
    entries[1].be_replaced()
    entries[2].leave(0)
    entries[2].leave(7)  # of two words the first counts
    entries[1].leave(3)  # it could not be replaced
    ledger.serve(0, -1)
    assert ledger.silent() == "1, 4"
    assert ledger.first_failure == 3
    child = os.fork()
    if child == 0:
        entries[0].leave(0)  # a child of the worker is not the worker
        os._exit(0)
    os.waitpid(child, 0)
    ledger.serve(0, -1)
    assert ledger.silent() == "1, 4"


def test_nonsense_is_not_taken_down(ledger):
    ExitRecord(ledger.environ["DVKERNELS_LEDGER"], 1, 1).arrive()
    for nonsense in (b"", b"here", b"ended x 0", b"ended 1", b"\xff", b"gone 1 0", b"1 " * 1000):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect("\0" + ledger.environ["DVKERNELS_LEDGER"])
            other.send(nonsense)
    ledger.serve(0, -1)
    assert ledger.silent() == "1"


def test_words_to_nobody_are_lost():
    ExitRecord("dvkernels-no-such-ledger", 0, 1).leave(1)
    assert ExitRecord(None, 0, 1).arrive() is None
