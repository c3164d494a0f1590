"""A job succeeds when every worker has reported success, whatever its launcher returns."""

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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets need Linux")

FORKED = """
if (child := os.fork()) == 0:
    os._exit(7)
os.waitpid(child, 0)
"""
# How a worker ends, and the status that it reports; None: it reports nothing.
ENDS = {
    "pass": 0,
    "sys.exit()": 0,
    "sys.exit(0)": 0,
    "sys.exit(256)": 0,  # the low byte, as in the operating system
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


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.wide)])
def test_workers_report_their_exit_status(tmp_path, every):
    started, ends = [], [*ENDS][::every]
    for number, end in enumerate(ends):
        records = ExitRecords(None)
        program = tmp_path / f"{number}.py"
        program.write_text(f"import os, signal, sys\n{end}")
        given = {"PMI_RANK": "1", "PMI_SIZE": "2", "PYTHONPATH": str(ROOT), **records.environ}
        command = [sys.executable, "-m", "dvkernels.launcher.worker", str(program)]
        worker = subprocess.Popen(
            command,
            env={**os.environ, **given},
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        started.append((records, worker))
    found = {}
    for end, (records, worker) in zip(ends, started, strict=True):
        worker.wait(SECONDS)
        records.serve(0, -1)
        found[end] = None if records.silent() else records.first_failure or 0
        records.close()
    assert found == {end: ENDS[end] for end in ends}


# How worker 1 of 2 ends, the launcher's exit status, and the status of the job.
JOBS = {
    ("os._exit(0)", "0"): 0,
    ("sys.exit(3)", "0"): 3,
    ("raise ValueError", "0"): 1,
    ("sys.exit(2)", "3"): 2,  # MPICH combines all statuses bitwise
    ("sys.exit(42)", "137"): 137,  # stopped by a launcher that had lost another worker
    ("sys.exit(42)", "0"): 42,
    ("os.kill(os.getpid(), signal.SIGKILL)", "0"): 1,
    ("os.kill(os.getpid(), signal.SIGKILL)", "9"): 9,
}


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.wide)])
def test_reports_of_workers_outrank_the_status_of_the_launcher(start, script, every):
    chosen = {job: JOBS[job] for job in [*JOBS][::every]}
    program = script("if rank == 1:\n    exec(sys.argv[1])")
    jobs = {job: start("-n", "2", program, job[0], FAKE_STATUS=job[1]) for job in chosen}
    found = {}
    for (end, status), process in jobs.items():
        _, err = process.communicate(timeout=SECONDS)
        found[end, status] = process.returncode
        assert ("ended without a report" in err) == ("kill" in end and status == "0"), err
    assert found == chosen


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
    assert "ended without a report" in err
    assert "starting again" in err


@pytest.fixture
def records():
    source, target = os.pipe()
    records = ExitRecords(source)
    yield records
    records.close()
    os.close(source)
    os.close(target)


def test_workers_without_a_report_are_listed(records):
    senders = [ExitRecord(records.environ["DVKERNELS_LEDGER"], worker, 4) for worker in range(1, 5)]
    assert records.silent() == ""
    for sender in senders[:3]:
        sender.report_start()
    records.serve(0, -1)
    assert records.silent() == "1, 2, 3 and 1 that never started"
    senders[3].report_start()
    senders[1].report_exec()
    senders[2].report_exit(0)
    senders[2].report_exit(7)  # of two reports the first counts
    senders[1].report_exit(3)  # its exec failed
    records.serve(0, -1)
    assert records.silent() == "1, 4"
    assert records.first_failure == 3
    child = os.fork()
    if child == 0:
        senders[0].report_exit(0)  # ignored: a child of the worker is not the worker
        os._exit(0)
    os.waitpid(child, 0)
    records.serve(0, -1)
    assert records.silent() == "1, 4"


def test_malformed_reports_are_ignored(records):
    ExitRecord(records.environ["DVKERNELS_LEDGER"], 1, 1).report_start()
    for nonsense in (b"", b"here", b"ended x 0", b"ended 1", b"\xff", b"gone 1 0", b"1 " * 1000):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect("\0" + records.environ["DVKERNELS_LEDGER"])
            other.send(nonsense)
    records.serve(0, -1)
    assert records.silent() == "1"


def test_reports_without_a_receiver_are_lost():
    ExitRecord("dvkernels-no-such-records", 0, 1).report_exit(1)
    assert ExitRecord(None, 0, 1).report_start() is None
