"""The processes of this host, as Linux shows them; nothing where there is no ``/proc``."""

from __future__ import annotations

import os
from pathlib import Path

from dvkernels.cluster.launcher_environment import Environment

__all__ = ["descendants_of", "environment_of", "parent_of", "state_of"]

_PROC = Path("/proc")


def parent_of(pid: int) -> int:
    """Return the process that a process belongs to, 0 where that is not shown.

    A process that has ended and that nobody has waited for is not shown.
    """
    state, parent = _state_and_parent(pid)
    return 0 if state in "ZX" else parent


def state_of(pid: int) -> str:
    """Return the letter for what a process does: R runs, S sleeps, T is stopped, Z has ended.

    X for one that is not there.
    """
    return _state_and_parent(pid)[0]


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "X", 0
    # "7 (any (name)) S 1 ...": the name may hold anything, and the last bracket ends it.
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, int(parent)


def environment_of(pid: int) -> Environment | None:
    """Return the variables that a process was started with, None where they are not shown."""
    try:
        variables = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    pairs = (os.fsdecode(variable).partition("=") for variable in variables if variable)
    return {name: value for name, _, value in pairs}


def descendants_of(pid: int) -> list[int]:
    """Return the processes that a process started, and those that these started, and so on."""
    try:
        shown = [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal()]
    except OSError:
        return []
    children: dict[int, list[int]] = {}
    for process in shown:
        children.setdefault(parent_of(process), []).append(process)
    found = [pid]
    for parent in found:  # grows while it is walked
        found.extend(children.get(parent, ()))
    return found[1:]
