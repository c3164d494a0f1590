"""Jobs of processes that form a host group, without a launcher and without mpi4py.

They are forks of one process that has imported the programs, which costs a tenth of new ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from pathlib import Path

import fork_server
import pytest

PROGRAMS = Path(__file__).parent / "worker_programs.py"
SHARED = Path("/dev/shm")

START = """
import importlib, json, os, sys
sys.modules["mpi4py"] = None  # which no host group imports
folder, file = os.path.split(sys.argv[1])
sys.path.insert(0, folder)
programs = importlib.import_module(file.removesuffix(".py"))
count, program, *words = json.loads(sys.argv[2])
children = []
for rank in range(count):
    child = os.fork()
    if child == 0:
        os.environ.update(DVKERNELS_GROUP_RANK=str(rank), DVKERNELS_GROUP_SIZE=str(count))
        sys.argv = [file, program, *words]
        getattr(programs, program)(*words)
        print(f"done: {rank}", flush=True)
        sys.exit()  # with the handlers of the exit, as any program
    children.append(child)
codes = dict.fromkeys(children)
while None in codes.values():
    child, status = os.waitpid(-1, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        stopped = child
    else:
        codes[child] = os.waitstatus_to_exitcode(status)
    if "stopped" in globals() and codes[stopped] is None:
        if all(codes[other] is not None for other in children if other != stopped):
            os.kill(stopped, 9)
print("codes:", json.dumps([codes[child] for child in children]))
"""


def outcome(
    count: int, program: str, *words: object, file: Path = PROGRAMS
) -> tuple[list[int], str]:
    """Return the exit status of each process, and the output; nothing of the job is left."""
    name = f"dvkernels-test-{uuid.uuid4().hex}"
    arguments = json.dumps([count, program, *map(str, words)])
    try:
        ended = fork_server.run(
            START, file, arguments, DVKERNELS_GROUP=name, DVKERNELS_GROUP_TOKEN=name
        )
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"the job did not end in {late.timeout:g} s; it wrote:\n{late.output}")
    written = f"{ended.stdout}\n{ended.stderr}"
    assert ended.returncode == 0, written
    assert not os.path.lexists(SHARED / name)
    _, _, codes = ended.stdout.rpartition("codes: ")
    return json.loads(codes), written


def run(count: int, program: str, *words: object, file: Path = PROGRAMS) -> None:
    """Run a job that must succeed."""
    codes, written = outcome(count, program, *words, file=file)
    assert codes == [0] * count, written
