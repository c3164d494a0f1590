"""Limits on threads, memory, descriptors or file size: a CheckpointError, no loss, no hang."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux")

PROGRAM = """
import contextlib, json, os, resource, sys, tempfile
import numpy as np
import dvkernels as dv

class Counter:
    n = 0
    def state_dict(self): return {"n": self.n, "more": np.full(1000, self.n)}
    def load_state_dict(self, state): self.n = state["n"]

def objects(number):
    counter = Counter()
    counter.n = number
    return dict(
        weight=dv.Variable(np.full(LENGTH, float(number))), counter=counter, list=[number] * 100,
        data={str(k): number for k in range(100)}, pair=(number,),
        rng=np.random.Generator(np.random.MT19937(number)), other=np.full((3, 2), number),
    )

def numbers(objects):
    states = {n: repr(np.random.MT19937(n).state) for n in (1, 2, 3)}
    values = {*objects["weight"].numpy()[[0, LENGTH // 2, -1]], *objects["list"]}
    values |= {*objects["data"].values(), *objects["pair"], *objects["other"].ravel()}
    values.add(objects["counter"].n)
    values |= {n for n in states if states[n] == repr(objects["rng"].bit_generator.state)}
    return {int(n) for n in values}

def used(what):
    if what == "RLIMIT_NPROC":
        os.setuid(65534)
        return len(os.listdir("/proc/self/task")), 1
    if what == "RLIMIT_NOFILE":
        return len(os.listdir("/proc/self/fd")) - 1, 1
    if what == "RLIMIT_AS":
        return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize(), 0
    return 0, 1 << 12

def exhausted(free):
    "Take all memory, down to the holes of the allocators, and give some blocks back."
    hog = [None] * 4_000_000
    count, last = 0, {}
    try:
        for size in (1 << 16, 1 << 12, 1 << 10, 500, 50):
            try:
                while True:
                    hog[count] = bytes(size)
                    count += 1
            except MemoryError:
                last[size] = count
    finally:
        for size, blocks in ((1 << 12, free), (500, 15 * free + 30)):
            for place in range(max(0, last[size] - blocks), last[size]):
                hog[place] = None
    return hog

what, verb, LENGTH = sys.argv[1], sys.argv[2], int(sys.argv[3])
limit = getattr(resource, what)
folder = tempfile.mkdtemp()
os.chmod(folder, 0o777)
os.umask(0)
path = folder + "/run"
with dv.Checkpoint(**objects(1)) as first:
    first.save(path, background=True)
# A first import inside the limit would compile source, and what the compiler frees would serve.
dv.Checkpoint(**objects(2)).restore(path)
crashes = []
unlimited = resource.getrlimit(limit)
for free in map(int, sys.argv[4:]):
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if status:
            crashes.append([free, f"status {status}"])
        continue
    checkpoint = dv.Checkpoint(**objects(2))
    how = "done"
    base, unit = used(what)
    resource.setrlimit(limit, (base + free * unit, unlimited[1]))
    hog = exhausted(free) if what == "RLIMIT_AS" else None
    try:
        if verb == "restore":
            checkpoint.restore(path)
        else:
            checkpoint.save(path, background=verb == "background")
            checkpoint.close()
    except dv.errors.CheckpointError as error:
        how = "error"
    except BaseException as error:
        how = f"{type(error).__name__}: {error}"
    resource.setrlimit(limit, unlimited)
    hog = None
    found = dv.Checkpoint(**objects(3))
    fault = ""
    try:
        with contextlib.suppress(dv.errors.CheckpointError):
            checkpoint.close()
        found.restore(path)
        if how not in ("done", "error"):
            fault = how
        elif verb == "restore":
            if numbers(checkpoint.objects) != ({1} if how == "done" else {2}):
                fault = f"{how}, and the objects hold {numbers(checkpoint.objects)}"
        elif numbers(found.objects) != ({2} if how == "done" else {1}):
            fault = f"{how}, and there is {numbers(found.objects)}"
        if os.listdir(folder) != ["run"]:
            dv.Checkpoint(**objects(1)).save(path)
        if os.listdir(folder) != ["run"]:
            fault += f" left {os.listdir(folder)}"
    except BaseException as error:
        fault = f"{how}, then {type(error).__name__}: {error}"
    with contextlib.suppress(BaseException):
        dv.Checkpoint(**objects(1)).save(path)
    print(json.dumps([free, how, fault]), flush=True)
    os._exit(0)
print(json.dumps(["crashes", crashes]))
"""

# The resources, and how much of each is free: from nothing to enough.
LIMITS = {"RLIMIT_NPROC": range(5), "RLIMIT_NOFILE": range(16), "RLIMIT_FSIZE": range(10)}
SOME = {"RLIMIT_NPROC": (0, 1, 4), "RLIMIT_NOFILE": (0, 3, 6, 15), "RLIMIT_FSIZE": (0, 1, 3, 9)}


def campaign(what, verb, length, frees):
    """Return (free, outcome, fault) of each attempt."""
    done = subprocess.run(
        [
            sys.executable,
            "-B",
            "-W",
            "ignore",
            "-c",
            PROGRAM,
            what,
            verb,
            *map(str, (length, *frees)),
        ],
        # Compiled from source: where modules are loaded, holes are left that suffice for a save.
        env={**os.environ, **({"PYTHONPYCACHEPREFIX": "/nowhere"} if what == "RLIMIT_AS" else {})},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1:] == [["crashes", []]], (lines[-1:], done.stderr[-500:])
    return lines[:-1]


@pytest.mark.parametrize(
    ("what", "frees"),
    [
        *SOME.items(),
        *(pytest.param(*limit, marks=pytest.mark.wide) for limit in LIMITS.items()),
        # Threads run out of memory while they start. Where the allocators have holes, an
        # attempt may succeed with nothing free.
        pytest.param("RLIMIT_AS", (0, 0, 0, 200), marks=pytest.mark.wide),
        pytest.param("RLIMIT_AS", (0, 0, *range(100)), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("verb", ["save", "background", "restore"])
def test_saves_and_restores_under_resource_limits_succeed_or_change_nothing(what, frees, verb):
    if verb == "restore" and what == "RLIMIT_FSIZE":
        pytest.skip("a restore writes nothing")
    if what == "RLIMIT_NPROC" and resource.getrlimit(resource.RLIMIT_NPROC)[1] == 0:
        pytest.skip("no threads at all")
    found = campaign(what, verb, 3000, frees)
    wrong = [[free, fault] for free, _, fault in found if fault]
    assert not wrong, wrong
    assert found[-1][1] == "done", found
    if what != "RLIMIT_NPROC":
        assert "error" in [how for free, how, _ in found if free == 0], found
    assert len(found) == len(frees)
