"""Jobs of several processes under the installed mpiexec; none of them is left behind."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dvkernels.cluster import procfs

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = Path(__file__).parent / "worker_programs.py"
_MARK = "DVKERNELS_TEST_JOB"
# For Open MPI: run as root, and with more processes than cores; other MPIs ignore it.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@functools.cache
def mpiexec() -> str | None:
    """Return the mpiexec of this interpreter's environment, or of PATH."""
    own = Path(sys.executable).parent / "mpiexec"
    return str(own) if own.exists() else shutil.which("mpiexec")


@functools.cache
def launcher_says() -> str:
    """Return the output of ``mpiexec --version``, or "" without mpiexec."""
    if mpiexec() is None:
        return ""
    said = subprocess.run([mpiexec(), "--version"], capture_output=True, text=True, check=False)
    return said.stdout + said.stderr


def is_open_mpi() -> bool:
    """Return whether mpiexec is that of Open MPI."""
    return "Open MPI" in launcher_says()


needs_mpi = [
    pytest.mark.mpi,
    pytest.mark.skipif(
        mpiexec() is None or importlib.util.find_spec("mpi4py") is None,
        reason="needs mpi4py, and mpiexec beside the interpreter or in the path",
    ),
]


@dataclass(frozen=True)
class Outcome:
    """Exit status and output of a job."""

    code: int
    written: str


class Job:
    """Job whose processes run a function of ``worker_programs.py``.

    ``prefix`` are words before the launcher's name, ``options`` those after it, ``environ`` more
    variables.
    """

    def __init__(
        self,
        count: int,
        program: str,
        *args: object,
        prefix: Sequence[str] = (),
        options: Sequence[str] | None = None,
        environ: Mapping[str, str] | None = None,
        file: Path = PROGRAMS,
    ):
        self.mark = uuid.uuid4().hex
        words = [*prefix, mpiexec(), *(options or ())]
        command = [*words, "-n", str(count), sys.executable, str(file)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        # Our warnings are errors in workers as in tests; MPI's own output is suppressed.
        environment = os.environ | _OPEN_MPI | {_MARK: self.mark, "PYTHONPATH": path}
        environment |= environ or {}
        self._process = subprocess.Popen(
            [*command, program, *map(str, args)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    def members(self) -> list[int]:
        """Return the living processes of the job, including the launcher's."""
        wanted = (_MARK, self.mark)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and procfs.state_of(int(entry.name)) not in "ZX":
                held = procfs.environment_of(int(entry.name)) or {}
                if (held.get(_MARK), _MARK) == wanted[::-1]:
                    found.append(int(entry.name))
        return found

    def wait(self, seconds: float = 100.0) -> Outcome:
        """Wait for the job; a job that hangs or leaves a process behind is a failure."""
        try:
            written, _ = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            written, _ = self._process.communicate()
            pytest.fail(f"the job did not end in {seconds:g} s; it wrote:\n{written}")
        deadline = time.monotonic() + 5
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            self.kill()
            pytest.fail(f"processes {left} were left behind; the job wrote:\n{written}")
        return Outcome(self._process.returncode, written)

    def kill(self) -> None:
        """End every process of the job."""
        for member in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)


def run(
    count: int,
    program: str,
    *args: object,
    environ: Mapping[str, str] | None = None,
    file: Path = PROGRAMS,
) -> Outcome:
    """Run a job that must succeed."""
    outcome = Job(count, program, *args, environ=environ, file=file).wait()
    assert outcome.code == 0, outcome.written
    return outcome
