"""Signals to the tasks of a Slurm job step, which ``srun`` itself does not hand on.

At SIGTERM it kills the tasks, at SIGINT it says how they are. Slurm's own ``scancel`` brings them
any signal, on all nodes.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from pathlib import Path

__all__ = ["send"]

_SECONDS_FOR_AN_ANSWER = 10.0
# StepId=7.0 ... SrunHost:Pid=login1:4711, one step a line
_STEP = re.compile(r"^StepId=(?P<step>\S+) .*\bSrunHost:Pid=(?P<host>[^\s:]+):(?P<pid>\d+)", re.M)


def send(srun: str, pid: int, number: signal.Signals) -> bool:
    """Bring a signal to the tasks that an ``srun`` of this host has started.

    Parameters
    ----------
    srun : str
        Its path: the other commands of Slurm lie beside it.
    pid : int
        Its process.
    number : Signals
        The signal.

    Returns
    -------
    bool
        Whether Slurm has taken it; not if it does not answer or knows no such step.
    """
    here = socket.gethostname().partition(".")[0]
    steps = _answer(srun, "scontrol", "--oneliner", "show", "steps") or ""
    for found in _STEP.finditer(steps):
        if (found["host"].partition(".")[0], int(found["pid"])) == (here, pid):
            return _answer(srun, "scancel", f"--signal={number.name}", found["step"]) is not None
    return False


def _answer(srun: str, command: str, *words: str) -> str | None:
    """Return what a command of Slurm prints, None if it fails."""
    try:
        return subprocess.run(
            [str(Path(srun).with_name(command)), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_SECONDS_FOR_AN_ANSWER,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
