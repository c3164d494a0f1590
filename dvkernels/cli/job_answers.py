"""Answers of the processes of a running job, asked over their sockets."""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvkernels.cluster import procfs
from dvkernels.profiler import ask_server

__all__: list[str] = []

_SECONDS_TO_ANSWER = 1.0  # of a process whose Python code runs
_SECONDS_FOR_STACKS = 1.0

Answer = dict[str, Any]


def answers(pid: int, watch_seconds: float, last: int) -> list[Answer]:
    """Ask a process, and all workers of its job on this host, at once; sort their answers."""
    pids = _processes_of(pid)
    found = _answers(pids, watch_seconds, last)
    if len(pids) == 1 and found[0]["num_workers"] > 1:  # one worker was named: ask all
        others = _siblings_of(pids[0], found[0]["num_workers"])
        found += _answers(others, watch_seconds, last)
    return sorted(found, key=lambda answer: int(answer["worker"]))


def _processes_of(pid: int) -> list[int]:
    """Return this process and its descendants that can be asked; raise if there are none."""
    if not procfs.parent_of(pid) and pid != 1:
        raise ProcessLookupError(f"there is no process {pid} on this host")
    own = [pid] if _socket_of(pid).exists() else []
    found = own + [child for child in procfs.descendants_of(pid) if _socket_of(child).exists()]
    environment = procfs.environment_of(pid) or {}
    if not found:
        is_off = environment.get(ask_server.VARIABLE) == "0"
        why = (
            f"{ask_server.VARIABLE}=0 is set in it"
            if is_off
            else "it has run no step of several replicas or workers, is not a program of "
            "dvkernels, or belongs to another user"
        )
        raise ConnectionRefusedError(f"process {pid} cannot be asked: {why}")
    return found


def _siblings_of(worker: int, num_workers: int) -> list[int]:
    """Return the other workers of a job on this host: those below the nearest common ancestor."""
    ancestor, found = procfs.parent_of(worker), [worker]
    while ancestor > 1 and len(found) < num_workers:
        below = procfs.descendants_of(ancestor)
        found = [child for child in below if _socket_of(child).exists()]
        ancestor = procfs.parent_of(ancestor)
    return [child for child in found if child != worker] if len(found) <= num_workers else []


def _answers(pids: list[int], watch_seconds: float, last: int) -> list[Answer]:
    """Ask processes at once; return their answers."""
    if not pids:
        return []
    question = json.dumps({"watch": watch_seconds, "last": last}).encode() + b"\n"
    with concurrent.futures.ThreadPoolExecutor(len(pids)) as pool:
        asked = [pool.submit(_ask, pid, question, watch_seconds) for pid in pids]
        return [each.result() for each in asked]


def _socket_of(pid: int) -> Path:
    return ask_server.socket_of(pid, _user_of(pid))


def _user_of(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return os.getuid()


def _ask(pid: int, question: bytes, watch_seconds: float) -> Answer:
    """Return the answer of a process; if its Python code does not run, its stacks."""
    path, began = _socket_of(pid), time.monotonic()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS_TO_ANSWER + watch_seconds)
            connection.connect(str(path))
            connection.sendall(question)
            answer: Answer = json.loads(b"".join(_received(connection)))
            if "error" in answer:
                raise ConnectionError(f"process {pid} answered: {answer['error']}")
            return answer
    except TimeoutError:
        stacks = _stacks(pid)
        waited = time.monotonic() - began
        return {
            "pid": pid, "worker": -1, "num_workers": 1, "stacks": stacks,
            "lock": f"held by foreign code for {waited:.1f} s or more",
        }  # fmt: skip


def _received(connection: socket.socket) -> Iterator[bytes]:
    while part := connection.recv(1 << 16):
        yield part


def _stacks(pid: int) -> str:
    """Return the stacks that ``faulthandler`` writes without the interpreter's lock."""
    path = ask_server.stacks_of(pid, _user_of(pid))
    try:
        before = path.stat().st_size
        os.kill(pid, ask_server.stacks_signal())
        end, size = time.monotonic() + _SECONDS_FOR_STACKS, before
        while time.monotonic() < end:
            time.sleep(0.05)
            last, size = size, path.stat().st_size
            if size == last > before:
                break
        with path.open("rb") as file:
            file.seek(before)
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"none: {error}"
