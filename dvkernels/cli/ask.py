"""``python -m dvkernels ask``: what a running job does, asked over its processes' sockets."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvkernels.cli import argument_types
from dvkernels.cluster import procfs
from dvkernels.profiler import ask_server

__all__: list[str] = []

HELP = "ask a running job what each replica does, waits for, and holds in memory"

_SECONDS_TO_ANSWER = 1.0  # of a process whose Python code runs
_SECONDS_FOR_STACKS = 1.0

Answer = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the process and the options."""
    parser.add_argument(
        "pid", type=argument_types.positive, metavar="PID",
        help="process of the job on this host: launch, a worker, or a program of one process",
    )  # fmt: skip
    parser.add_argument(
        "--watch", type=argument_types.seconds, default=0.2, metavar="SECONDS",
        help="how long to watch the collectives",
    )  # fmt: skip
    parser.add_argument(
        "--last", type=argument_types.positive, default=10, metavar="N",
        help="how many collectives to show",
    )  # fmt: skip
    parser.add_argument("--stacks", action="store_true", help="show the stacks of all threads")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object (default: lines of text)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask all workers of the job on this host at once, and print their answers."""
    pids = _processes_of(arguments.pid)
    answers = _answers(pids, arguments.watch, arguments.last)
    if len(pids) == 1 and answers[0]["num_workers"] > 1:  # one worker was named: ask all
        others = _siblings_of(pids[0], answers[0]["num_workers"])
        answers += _answers(others, arguments.watch, arguments.last)
    answers.sort(key=lambda found: found["worker"])
    late = [*_late(answers)]
    if arguments.json:
        print(json.dumps({"late": late, "workers": answers}))
        return 0
    for answer in answers:
        _print(answer, arguments.stacks)
    for each in late:
        print(f"waited for: {each['name']}, {each['at']}")
    return 0


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


# -- the text --------------------------------------------------------------------------------------


def _late(answers: list[Answer]) -> Iterator[dict[str, Any]]:
    """Yield the replicas and workers that others wait for."""
    is_between = any(
        each["state"] == "waits for workers" for a in answers for each in a.get("replicas", [])
    )
    for answer in answers:
        replicas = answer.get("replicas", [])
        waits = any(each["state"] in ("waits", "performs") for each in replicas)
        if "lock" in answer and (is_between or len(answers) == 1):
            yield {"pid": answer["pid"], "name": f"process {answer['pid']}", "at": answer["lock"]}
        if any(each["state"] == "waits for workers" for each in replicas):
            continue  # the others of this worker wait for one that waits for workers
        running = [each for each in replicas if each["state"] == "runs"]
        for each in running if waits or is_between else ():
            name = f"replica {each['replica']} of worker {answer['worker']}"
            yield {**each, "pid": answer["pid"], "worker": answer["worker"], "name": name}
        if is_between and not replicas:
            name = f"worker {answer['worker']}"
            yield {"pid": answer["pid"], "name": name, "at": "outside of a step"}


def _print(answer: Answer, with_stacks: bool) -> None:
    if "lock" not in answer:
        print(f"worker {answer['worker']}, process {answer['pid']}")
    else:
        print(f"process {answer['pid']}")
        print(f"  the interpreter's lock is {answer['lock']}; its stacks:")
        print("    " + answer["stacks"].replace("\n", "\n    "))
        return
    for each in sorted(answer["replicas"], key=lambda found: found["replica"]):
        print(f"  replica {each['replica']} {_state(each)}, at {each['at']}")
    for each in answer["iterators"]:
        print(f"  {each['iterator']}: {each['ready']} of {each['prefetch']} batches ready")
    for each in answer["collectives"]:
        print(
            f"  {each['seconds_ago']:.3f} s ago replica {each['replica']} ended {each['call']} "
            f"after {each['seconds']:.6f} s"
        )
    memory = answer["memory"]
    for device, owners in sorted(memory["by_device"].items()):
        held = ", ".join(f"{owner} {nbytes:,}" for owner, nbytes in owners.items() if nbytes)
        print(f"  {device}: {held} bytes")
    for thread in answer["threads"] if with_stacks else ():
        print(f"  thread {thread['name']}")
        for line in thread["stack"]:
            print(f"    {line}")


def _state(replica: dict[str, Any]) -> str:
    state = replica["state"]
    if state == "runs":
        return "runs" if "item" not in replica else f"works on item {replica['item']}"
    text = f"{state.replace('waits', 'waits in ' + replica['call'], 1)}"
    if state == "performs":
        return f"performs {replica['call']}"
    if state == "waits":
        seconds = replica["seconds"]
        lasted = "less than a second" if seconds is None else f"{seconds:.1f} s"
        text += f" for replicas {replica['replicas']}, {lasted}"
    return text
