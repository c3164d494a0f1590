"""Fixtures that start jobs by launch under a fake launcher."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FAKE = Path(__file__).with_name("fake_mpiexec.py")
SECONDS = 60


@pytest.fixture
def mpiexec(tmp_path):
    path = tmp_path / "mpiexec"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def script(tmp_path):
    """Return a function that writes a program for the workers, and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "program.py"
        start = "import os, signal, sys, time\nrank = int(os.environ['PMI_RANK'])\n"
        path.write_text(start + text)
        return str(path)

    return write


@pytest.fixture
def start(mpiexec, tmp_path):
    """Return a function that starts launch; processes still running after the test are killed."""
    started = []

    def start(
        *words: str,
        stdin: int = subprocess.DEVNULL,
        encoding: str = "utf-8",
        shell: str = 'exec "$@"',
        **environ: str,
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dvkernels", "launch", "--launcher", mpiexec, *words]
        process = subprocess.Popen(
            ["sh", "-c", shell, "sh", *command],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding=encoding,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def launch(start):
    def launch(*words: str, **environ: str) -> tuple[int, str, str]:
        process = start(*words, **environ)
        out, err = process.communicate(timeout=SECONDS)
        return process.returncode, out, err

    return launch
