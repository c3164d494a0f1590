"""Shared memory that a killed job leaves behind is removed, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from dvkernels.launcher.leaked_shm import Leftovers

SHARED = Path("/dev/shm")
SECONDS = 60

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs /dev/shm")

HOLDS = """
import mmap, sys
held = []
for k, path in enumerate(sys.argv[1:]):
    file = open(path, "w+b")
    file.truncate(4096)
    if k % 2:
        held.append(mmap.mmap(file.fileno(), 4096))
        file.close()
    else:
        held.append(file)
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path):
    """Return a function that starts a process which creates files and keeps them open or mapped."""
    started = []

    def hold(*words: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "up\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_files_of_the_job_are_removed_and_those_of_others_stay(hold, tmp_path):
    (tmp_path / "mpich_shm_before_0").write_text("")
    for name in ("ompi.7/1/session", "ompi.8/1/session"):
        (tmp_path / name).mkdir(parents=True)
    job: list[int] = []
    leftovers = Leftovers(lambda: job, [str(tmp_path)])
    names = {
        "job": ["mpich_shm_a_0", "ucx_shm_posix_1", "sm_segment.n1.0.1.0", "hydra_hwloc_xmlfile_x"],
        "program": ["weights.npy", "psm_1234", "mpich_shm.py"],
        "others": ["mpich_shm_b_0", "sm_segment.n1.0.2.0"],
    }
    own = [*names["job"], *names["program"], "mpich_shm_before_0"]
    job.append(hold(*(tmp_path / name for name in own)).pid)
    hold(*(tmp_path / name for name in names["others"]))
    leftovers.note()
    (tmp_path / "mpich_shm_a_0").rename(tmp_path / "old")
    (tmp_path / "mpich_shm_a_0").write_text("another job's, of the same name")
    leftovers.remove(7)
    leftovers.close()
    left = {path.name for path in tmp_path.iterdir()}
    kept = {
        *names["program"],
        *names["others"],
        "mpich_shm_a_0",
        "old",
        "mpich_shm_before_0",
        "ompi.8",
    }
    assert left == kept


def test_files_created_between_two_notes_are_noted(hold, tmp_path):
    job: list[int] = []
    leftovers = Leftovers(lambda: job, [str(tmp_path)])
    for number in range(3):
        job.append(hold(tmp_path / f"mpich_shm_{number}").pid)
        leftovers.note()
    for process in job:
        os.kill(process, signal.SIGKILL)
    leftovers.remove(7)
    leftovers.close()
    assert list(tmp_path.iterdir()) == []


SHARES = """
import mmap
mark = sys.argv[1]
held = []
received = []
def receive(number, frame):
    received.append(number)
    print("received", flush=True)
signal.signal(signal.SIGUSR1, receive)
for name in (f"mpich_shm_{mark}_{rank}", f"mine-{mark}-{rank}"):
    with open("/dev/shm/" + name, "w+b") as file:
        file.truncate(4096)
        held.append(mmap.mmap(file.fileno(), 4096))
print("up", flush=True)
while len(received) < 2:
    time.sleep(0.05)
exec(sys.argv[2])
"""
ENDS = {
    "exit": ("sys.exit(3)", []),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", []),
    "vanish": ("os._exit(0)", []),
    "SIGTERM": ("time.sleep(1000)", [signal.SIGTERM]),
    "SIGINT twice": ("time.sleep(1000)", [signal.SIGINT, signal.SIGINT]),
}


def test_no_job_leaves_shared_memory(start, script):
    program = script(SHARES)
    jobs = {}
    for how, (end, signals) in ENDS.items():
        mark = uuid.uuid4().hex
        jobs[how] = start("-n", "2", "--grace", "0.1", program, mark, end), mark, signals
    # Between two signals that it forwards, launch has noted the files that exist.
    for number in (signal.SIGUSR1, signal.SIGUSR1, 0):
        for process, _, _ in jobs.values():
            for _ in range(2):
                process.stdout.readline()
            process.send_signal(number)
    for process, _, signals in jobs.values():
        for number in signals:
            process.send_signal(number)
    left = {}
    for how, (process, mark, _) in jobs.items():
        process.communicate(timeout=SECONDS)
        paths = sorted(path for path in SHARED.iterdir() if mark in path.name)
        left[how] = [path.name.replace(mark, "x") for path in paths]
        for path in paths:
            path.unlink()
    assert left == {how: ["mine-x-0", "mine-x-1"] for how in ENDS}
