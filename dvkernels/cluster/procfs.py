"""Processes of this host, read from ``/proc``; without ``/proc`` no process is found."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

from dvkernels.cluster.launcher_environment import Environment

__all__ = [
    "descendants_of",
    "environment_of",
    "number_of",
    "parent_of",
    "start_time_of",
    "state_of",
    "this_host",
    "this_process_namespace",
]

_PROC = Path("/proc")


def parent_of(pid: int) -> int:
    """Return the id of a process's parent; 0 for a process that is not there or is a zombie."""
    state, parent = _state_and_parent(pid)
    return 0 if state in "ZX" else parent


def state_of(pid: int) -> str:
    """Return the state letter of a process: R running, S sleeping, T stopped, Z zombie.

    X for a process that is not there.
    """
    return _state_and_parent(pid)[0]


def start_time_of(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 if it is not there.

    It tells a process from a later one of the same id.
    """
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else 0


def _state_and_parent(pid: int) -> tuple[str, int]:
    fields = _stat_fields(pid)
    return (fields[0], int(fields[1])) if fields else ("X", 0)


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of a process's ``stat`` from its state on; none if it is not there."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # "7 (any (name)) S 1 ...": the name may contain brackets; the last one ends it.
    return stat.rpartition(")")[2].split()


def environment_of(pid: int) -> Environment | None:
    """Return the environment that a process was started with; None where it cannot be read."""
    try:
        variables = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    pairs = (os.fsdecode(variable).partition("=") for variable in variables if variable)
    return {name: value for name, _, value in pairs}


def descendants_of(pid: int) -> list[int]:
    """Return the ids of a process's children, grandchildren and so on."""
    try:
        pids = [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal()]
    except OSError:
        return []
    children: dict[int, list[int]] = {}
    for child in pids:
        children.setdefault(parent_of(child), []).append(child)
    tree = [pid]
    for parent in tree:  # breadth first: the list grows during the loop
        tree.extend(children.get(parent, ()))
    return tree[1:]


def this_host() -> int:
    """Return a number of this host and of its time since the last boot."""
    try:
        return number_of((_PROC / "sys/kernel/random/boot_id").read_text())
    except OSError:
        return number_of(platform.node())


def this_process_namespace() -> int:
    """Return a number of the namespaces of this process's id and start time; 0 without any."""
    found = ""
    for name in ("pid", "time"):
        with contextlib.suppress(OSError):
            found += os.readlink(_PROC / "self/ns" / name)
    return number_of(found) if found else 0


def number_of(text: str) -> int:
    """Return a number of 64 bits that stands for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)
