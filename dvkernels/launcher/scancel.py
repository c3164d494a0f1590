"""Signals to the tasks of a Slurm job step, sent by ``scancel``.

``srun`` itself does not forward them: at SIGTERM it kills the tasks, at SIGINT it prints their
state. ``scancel`` sends any signal to the tasks on all nodes.
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
    """Send a signal to the tasks that an ``srun`` of this host has started.

    Parameters
    ----------
    srun : str
        Path of ``srun``, whose folder also holds ``scontrol`` and ``scancel``.
    pid : int
        Process of ``srun``.
    number : Signals
        The signal.

    Returns
    -------
    bool
        Whether Slurm accepted the signal; False if it does not answer or knows no such step.
    """
    here = socket.gethostname().partition(".")[0]
    steps = _output_of(srun, "scontrol", "--oneliner", "show", "steps") or ""
    for found in _STEP.finditer(steps):
        if (found["host"].partition(".")[0], int(found["pid"])) == (here, pid):
            return _output_of(srun, "scancel", f"--signal={number.name}", found["step"]) is not None
    return False


def _output_of(srun: str, command: str, *arguments: str) -> str | None:
    """Return the output of a command of Slurm, None if it fails."""
    try:
        return subprocess.run(
            [str(Path(srun).with_name(command)), *arguments],
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
