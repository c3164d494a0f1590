"""The batch script starts what it is given, and the manifests start a launch that there is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dvkernels.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "examples" / "cluster"
FAKE = ROOT / "tests" / "unit" / "cli" / "fake_mpiexec.py"
PROGRAM = """
import os, sys
names = ("PMI_SIZE", "OMP_NUM_THREADS", "DVKERNELS_ATTEMPT")
print(*(os.environ[name] for name in names), sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the fake launcher needs Linux")
def test_the_batch_script(tmp_path):
    mpiexec, program = tmp_path / "mpiexec", tmp_path / "train.py"
    mpiexec.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    mpiexec.chmod(0o755)
    program.write_text(PROGRAM)
    ran = subprocess.run(
        [str(FILES / "slurm.sh"), "--launcher", str(mpiexec), str(program), "--epochs", "10"],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "4",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_RESTART_COUNT": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    expected = [f"[{rank}] 4 8 1 ['--epochs', '10']" for rank in range(4)]
    assert sorted(ran.stdout.splitlines()) == expected


def launches() -> list[list[str]]:
    """Return the words after each `launch` of the manifests."""
    mpijob = (FILES / "kubernetes-mpijob.yaml").read_text(encoding="utf-8")
    (after,) = re.findall(r"dvkernels, launch\](.*?)resources:", mpijob, re.DOTALL)
    listed = re.findall(r"^ +- (.*)$", after, re.MULTILINE)
    indexed = (FILES / "kubernetes-indexed-job.yaml").read_text(encoding="utf-8")
    (line,) = re.findall(r"-m dvkernels launch ((?:.|\\\n)*?)\n", indexed.replace("\\\n", " "))
    hosts = "digits-0.digits,digits-1.digits"
    return [[word.strip('"') for word in listed], shlex.split(line.replace('"$hosts"', hosts))]


@pytest.mark.parametrize("words", launches(), ids=["mpijob", "indexed job"])
def test_the_manifests_start_a_launch_that_there_is(tmp_path, capsys, words):
    mpiexec, program = tmp_path / "mpiexec", tmp_path / "train.py"
    mpiexec.write_text("#!/bin/sh\necho HYDRA build details:\n")
    mpiexec.chmod(0o755)
    program.write_text("")
    assert words[-1] == "/app/train.py"
    words = ["--launcher", str(mpiexec), "--dry-run", *words[:-1], str(program)]
    assert main(["launch", *words]) == 0
    assert "OMP_NUM_THREADS=8" in capsys.readouterr().out
