"""Signals that srun does not forward reach the tasks through scancel, here by fake commands."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kinds import daily

from dvkernels.launcher import scancel

ROOT = Path(__file__).resolve().parents[3]
HERE = socket.gethostname().partition(".")[0]
# As Slurm 22.05.8 writes it.
STEP = (
    "StepId={step} UserId=0 StartTime=2026-11-21T18:06:58 TimeLimit=UNLIMITED State=RUNNING "
    "Partition=low NodeList=node[1-2] Nodes=2 CPUs=2 Tasks=2 Name=train Network=(null) "
    "TRES=cpu=2,mem=0,node=2 ResvPorts=(null) CPUFreqReq=Default Dist=Block SrunHost:Pid={at}\n"
)
# Its tasks run in sessions of their own; at SIGTERM it kills them, and ends as srun does.
SRUN = """#!{python}
import os, pathlib, signal, subprocess, sys
if sys.argv[1:] == ["--version"]:
    sys.exit(print("slurm-wlm 22.05.8"))
words = [word for word in sys.argv[1:] if not word.startswith("--")]
tasks = [
    subprocess.Popen(
        words,
        start_new_session=True,
        env={{**os.environ, "SLURM_PROCID": str(k), "SLURM_STEP_NUM_TASKS": "2"}},
    )
    for k in range(2)
]
def kill(number, frame):
    for task in tasks:
        task.kill()
signal.signal(signal.SIGTERM, kill)
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path("step").write_text(f"{{os.getpid()}} " + " ".join(str(task.pid) for task in tasks))
ends = {{task.wait() for task in tasks}}
sys.exit(143 if -9 in ends else max(ends))
"""
SCONTROL = """#!{python}
import pathlib
pid = pathlib.Path("step").read_text().split()[0]
print({step!r}.replace("PID", pid))
"""
SCANCEL = """#!{python}
import os, pathlib, signal, sys
assert sys.argv[1].startswith("--signal=") and sys.argv[2] == "7.0"
for pid in pathlib.Path("step").read_text().split()[1:]:
    os.kill(int(pid), signal.Signals[sys.argv[1].removeprefix("--signal=")])
"""


@pytest.fixture
def slurm(tmp_path):
    """Return a function that writes a command into the folder in which srun lies."""

    def put(name: str, text: str, **values: str) -> str:
        path = tmp_path / name
        path.write_text(text.format(python=sys.executable, **values))
        path.chmod(0o755)
        return str(path)

    return put


def test_only_the_step_of_this_srun_gets_the_signal(slurm, tmp_path):
    shown = [
        ("5.0", f"elsewhere:{os.getpid()}"),
        ("6.0", f"{HERE}:1{os.getpid()}"),
        ("7.1", f"{HERE}:{os.getpid()}"),
        ("8.0", f"{HERE}:1"),
    ]
    (tmp_path / "shown").write_text("".join(STEP.format(step=s, at=at) for s, at in shown))
    slurm("scontrol", f"#!/bin/sh\ncat {tmp_path}/shown\n")
    slurm("scancel", f'#!/bin/sh\necho "$@" >> {tmp_path}/sent\n')
    srun = str(tmp_path / "srun")
    assert scancel.send(srun, os.getpid(), signal.SIGTERM)
    assert (tmp_path / "sent").read_text() == "--signal=SIGTERM 7.1\n"
    assert not scancel.send(srun, os.getpid() + 1, signal.SIGTERM)


@pytest.mark.parametrize("scontrol", [None, "#!/bin/sh\nexit 1\n", "#!/bin/sh\necho No job steps"])
def test_send_returns_false_without_an_answer(slurm, tmp_path, scontrol):
    if scontrol is not None:
        slurm("scontrol", scontrol)
    assert not scancel.send(str(tmp_path / "srun"), os.getpid(), signal.SIGINT)


PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
signal.signal(signal.SIGINT, lambda *_: sys.exit(43))
if sys.argv[1] == "fail" and os.environ["DVKERNELS_ATTEMPT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
print("up", flush=True)
while sys.argv[1] != "fail":
    time.sleep(0.01)
"""


@pytest.fixture
def start(slurm, tmp_path):
    started = []

    def start(*words: str) -> subprocess.Popen[str]:
        srun = slurm("srun", SRUN)
        (tmp_path / "program.py").write_text(PROGRAM)
        command = [sys.executable, "-m", "dvkernels", "launch", "--launcher", srun, *words[:-1]]
        process = subprocess.Popen(
            [*command, str(tmp_path / "program.py"), words[-1]],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fake srun needs Linux")


@pytest.mark.parametrize(
    ("sent", "status"),
    daily([(signal.SIGTERM, 42), (signal.SIGINT, 43)], (signal.SIGTERM, 42)),
)
def test_workers_under_srun_get_a_signal(slurm, start, sent, status):
    slurm("scontrol", SCONTROL, step=STEP.format(step="7.0", at=f"{HERE}:PID"))
    slurm("scancel", SCANCEL)
    process = start("-n", "2", "wait")
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] up\n", "[1] up\n"]
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err


def test_a_signal_that_slurm_rejects_is_reported_and_ends_the_job(start):
    process = start("-n", "2", "--grace", "0.5", "wait")
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGINT could not be sent to the workers" in err


def test_a_worker_killed_under_srun_is_a_failure(start):
    process = start("-n", "2", "--max-restarts", "1", "fail")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sorted(out.splitlines()) == ["[0] up", "[1] up"]
    assert "srun ended with status 143" in err
