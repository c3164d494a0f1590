"""The batch script starts and requeues a job, and the manifests use existing launch options."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dvkernels.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "examples" / "cluster"
FAKE = ROOT / "tests" / "unit" / "launcher" / "fake_mpiexec.py"
PROGRAM = """
import os, sys
names = ("PMI_SIZE", "OMP_NUM_THREADS", "DVKERNELS_ATTEMPT")
print(*(os.environ[name] for name in names), sys.argv[1:])
"""


BATCH_JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_RESTART_COUNT": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
print("up", flush=True)
while len(sys.argv) == 1:
    time.sleep(0.01)
sys.exit(int(sys.argv[1]))
"""


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def batch(tmp_path):
    """Return a function that starts the batch script with a program, in Slurm's environment."""
    started = []

    def batch(text: str, *words: str, state: str = "RUNNING") -> subprocess.Popen[str]:
        run = f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n'
        mpiexec = executable(tmp_path / "mpiexec", run)
        executable(tmp_path / "squeue", f"#!/bin/sh\necho {state}\n")
        executable(tmp_path / "scontrol", '#!/bin/sh\necho "scontrol $*"\n')
        (tmp_path / "train.py").write_text(text)
        found = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        process = subprocess.Popen(
            [FILES / "slurm.sh", "--launcher", mpiexec, tmp_path / "train.py", *words],
            env={**os.environ, **BATCH_JOB, **found, **path},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield batch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the fake launcher needs Linux")


@needs_linux
def test_the_batch_script_starts_all_workers(batch):
    process = batch(PROGRAM, "--epochs", "10")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    expected = [f"[{rank}] 4 8 1 ['--epochs', '10']" for rank in range(4)]
    assert sorted(out.splitlines()) == expected


@needs_linux
def test_the_batch_script_forwards_sigterm_and_requeues_a_job_that_saved(batch):
    process = batch(SAVES)
    for _ in range(4):
        process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (42, "scontrol requeue 7\n"), err


@needs_linux
@pytest.mark.parametrize(
    ("end", "state", "words"),
    [
        ("42", "RUNNING", ["scontrol requeue 7"]),  # Slurm has signalled only the workers
        ("42", "CANCELLED", []),
        pytest.param("0", "RUNNING", [], marks=pytest.mark.wide),
        pytest.param("2", "RUNNING", [], marks=pytest.mark.wide),
    ],
)
def test_the_batch_script_requeues_only_a_job_that_saved(batch, end, state, words):
    process = batch(SAVES, end, state=state)
    out, err = process.communicate(timeout=60)
    assert process.returncode == int(end), err
    assert out.splitlines()[4:] == words


def launches() -> list[list[str]]:
    """Return the arguments of each `launch` in the manifests."""
    mpijob = (FILES / "kubernetes-mpijob.yaml").read_text(encoding="utf-8")
    (after,) = re.findall(r"dvkernels, launch\](.*?)resources:", mpijob, re.DOTALL)
    listed = re.findall(r"^ +- (.*)$", after, re.MULTILINE)
    indexed = (FILES / "kubernetes-indexed-job.yaml").read_text(encoding="utf-8")
    (line,) = re.findall(r"-m dvkernels launch ((?:.|\\\n)*?)\n", indexed.replace("\\\n", " "))
    hosts = "digits-0.digits,digits-1.digits"
    return [[word.strip('"') for word in listed], shlex.split(line.replace('"$hosts"', hosts))]


@pytest.mark.parametrize("words", launches(), ids=["mpijob", "indexed job"])
def test_the_manifests_use_existing_options_of_launch(tmp_path, capsys, words):
    mpiexec, program = tmp_path / "mpiexec", tmp_path / "train.py"
    mpiexec.write_text("#!/bin/sh\necho HYDRA build details:\n")
    mpiexec.chmod(0o755)
    program.write_text("")
    assert words[-1] == "/app/train.py"
    words = ["--launcher", str(mpiexec), "--dry-run", *words[:-1], str(program)]
    assert main(["launch", *words]) == 0
    assert "OMP_NUM_THREADS=8" in capsys.readouterr().out
