"""A worker that fails ends the job, even if its error cannot be printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60

STUBBORN = """
class Stubborn(Exception):
    def __setattr__(self, name, value):
        raise AttributeError(name)
    def __str__(self):
        raise RuntimeError("no words")
"""
FAILURES = {
    "raise ValueError": 1,
    "raise KeyboardInterrupt": 130,
    "raise BaseException": 1,
    "sys.exit('words')": 1,
    "sys.stderr.close(); raise ValueError": 1,
    "sys.stderr = sys.stdout = None; raise ValueError": 1,
    "sys.stderr = None; sys.exit('words')": 1,
    "def hook(*error): raise RuntimeError\nsys.excepthook = hook\nraise ValueError": 1,
    "def hook(*error): sys.exit(0)\nsys.excepthook = hook\nraise ValueError": 1,
    STUBBORN + "raise Stubborn": 1,
    STUBBORN + "sys.exit(Stubborn())": 1,
    "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise error from error": 1,
    "def deeper(): deeper()\ndeeper()": 1,
    "import no_such_module": 1,
    "(": 1,
}


@pytest.mark.skipif(sys.platform != "linux", reason="the protocol of Hydra, over a pipe")
@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.wide)])
def test_every_failure_ends_the_job(tmp_path, every):
    started, failures = {}, [*FAILURES][::every]
    for number, failure in enumerate(failures):
        program = tmp_path / f"{number}.py"
        program.write_text(f"import sys\n{failure}")
        manager, end = os.pipe()
        given = {"PMI_RANK": "0", "PMI_SIZE": "1", "PMI_FD": str(end), "PYTHONPATH": str(ROOT)}
        worker = subprocess.Popen(
            [sys.executable, "-m", "dvkernels.launcher.worker", str(program)],
            env={**os.environ, **given},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[end],
        )
        os.close(end)
        started[failure] = worker, manager
    found, requests = {}, {}
    for failure, (worker, manager) in started.items():
        found[failure] = worker.wait(SECONDS)
        requests[failure] = os.read(manager, 100)
        os.close(manager)
    assert found == {each: FAILURES[each] for each in failures}
    assert requests == {each: b"cmd=abort exitcode=%d\n" % FAILURES[each] for each in failures}
