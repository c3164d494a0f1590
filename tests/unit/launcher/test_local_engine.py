"""launch --engine local: workers of this host without a launcher, and which engine auto takes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import LEAVING_SOMETHING, SECONDS, all_gone, pids_in, read_lines

from dvkernels.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts and ends processes")


@pytest.fixture
def start(tmp_path):
    """Return a function that starts launch with the text of a program."""
    started = []

    def start(text, *words, n=2, stdin=subprocess.DEVNULL):
        (tmp_path / "program.py").write_text("import os, signal, sys, time\n" + text)
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "dvkernels", "launch", "-n", str(n), *words, "program.py"],
                stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def launch(start):
    def launch(text, *words, **given):
        process = start(text, *words, **given)
        out, err = process.communicate(timeout=SECONDS)
        return process.returncode, out, err

    return launch


PLACE = """
rank = int(os.environ["DVKERNELS_GROUP_RANK"])
cores = sorted(os.sched_getaffinity(0))
print(rank, os.environ["DVKERNELS_GROUP_SIZE"], os.environ["OMP_NUM_THREADS"], *cores)
attempt = os.environ["DVKERNELS_ATTEMPT"]
if rank == 1 and attempt == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == "0":
    time.sleep(1000)
"""


@pytest.mark.skipif(CORES < 2, reason="one core cannot be shared out")
def test_place_binding_and_a_restart_after_a_kill(launch):
    status, out, err = launch(PLACE, "--max-restarts", "1")
    assert status == 0, err
    assert "launch: local ended with status 137" in err
    every = sorted(os.sched_getaffinity(0))
    share = CORES // 2
    bound = [every[rank * share : (rank + 1) * share] for rank in (0, 1)]
    lines = [f"[{k}] {k} 2 {share} {' '.join(map(str, bound[k]))}" for k in (0, 1)]
    assert sorted(out.splitlines())[-2:] == [lines[1], lines[1]]
    assert lines[0] in out


@pytest.mark.wide
@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_nothing_is_left_when_launch_is_ended(start, sent, status):
    process = start("print('up', os.getpid(), flush=True)\ntime.sleep(1000)")
    pids = [int(line.split()[2]) for line in read_lines(process, 2)]
    process.send_signal(sent)
    process.communicate(timeout=SECONDS)
    assert process.returncode == status
    assert all_gone(pids)


@pytest.mark.wide
def test_what_a_worker_leaves_behind_is_ended(launch):
    status, out, _ = launch(LEAVING_SOMETHING)
    assert status == 0
    assert all_gone(pids_in(out.splitlines()))


@pytest.mark.wide
def test_input_output_and_a_failure(launch, start):
    process = start("print(repr(sys.stdin.read()))", n=3, stdin=subprocess.PIPE)
    out, _ = process.communicate("hello", timeout=SECONDS)
    assert sorted(out.splitlines()) == ["[0] 'hello'", "[1] ''", "[2] ''"]
    text = "if os.environ['DVKERNELS_GROUP_RANK'] == '1':\n    raise ValueError('this one')"
    status, _, err = launch(f"{text}\ntime.sleep(1000)")
    assert status == 1
    assert "[1] ValueError: this one" in err


@pytest.mark.wide
def test_a_worker_with_mpi4py_is_warned(launch):
    text = "import types, dvkernels as dv\nsys.modules['mpi4py'] = types.ModuleType('mpi4py')\n"
    status, _, err = launch(text + "with dv.MultiWorkerMirroredStrategy(devices=1): pass")
    assert status == 0, err
    assert len(re.findall(r"program.py:4: UserWarning: .* launch --engine mpi", err)) == 2, err


def test_launch_starts_workers_without_importing_what_only_they_use(tmp_path):
    (tmp_path / "program.py").write_text("")
    command = [sys.executable, "-X", "importtime", "-m", "dvkernels", "launch", "-n", "1"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [*command, "program.py"],
        stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environ, check=True,
    ).stderr  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in said.splitlines()}
    assert "dvkernels.launcher.supervision" in imported
    assert imported.isdisjoint({"numpy", "dvkernels.kernels", "dvkernels.strategies.base"})


def engine_of(words, environ, monkeypatch, capsys):
    for name in ("SLURM_JOB_ID", "PBS_NODEFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    status = main(["launch", *words, "--dry-run", "-m", "x"])
    out, err = capsys.readouterr()
    return out if status == 0 else err


@pytest.mark.parametrize(
    ("words", "environ", "expected"),
    [
        ([], {}, "local_engine.py"),
        (["-n", "3"], {"PATH": ""}, "local_engine.py 3 0"),
        (["--engine", "local"], {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "9"}, "local_engine.py"),
        (["--engine", "local", "--hosts", "localhost:2"], {}, "local_engine.py 2"),
        (["--engine", "local", "--hosts", "a:2"], {}, "takes no other --hosts"),
        (["--engine", "local", "--launcher", "srun"], {}, "needs no --launcher"),
        (["--engine", "local", "--launcher-option=-x"], {}, "no --launcher-option"),
        (["--engine", "mpi"], {"PATH": ""}, "none of mpiexec, mpirun is in"),
        (["--engine", "slurm"], {"PATH": ""}, "none of srun is in"),
        ([], {"SLURM_JOB_ID": "7", "PATH": ""}, "none of mpiexec, mpirun, srun is in"),
        (["--hosts", "a,b"], {"PATH": ""}, "or use --engine local"),
        (["--launcher", "/no/such"], {}, "none of /no/such is in"),
    ],
)
def test_engines(words, environ, expected, monkeypatch, capsys):
    if "none of mpi" in expected or "or use" in expected:
        monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert expected in engine_of(words, environ, monkeypatch, capsys)
