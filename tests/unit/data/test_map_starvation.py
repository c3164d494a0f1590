"""Iterators of ``map`` and of rows with almost no memory give the right elements, or an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs limits and /proc")

# Forks a process for each amount of memory. There a dataset is iterated under the limit, which
# holds in the program or in the worker processes, and again without it.
PROGRAM = """
import faulthandler, gc, os, resource, signal, sys, time
import numpy as np
from dvkernels import Dataset
from dvkernels.errors import DatasetError, WorkerLostError

NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
ALLOWED = (DatasetError, WorkerLostError, MemoryError)

def limit_of_memory(extra):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + extra, resource.RLIM_INFINITY))

class Fill:
    def __init__(self, extra):
        self.extra = extra
    def __call__(self, element):
        if self.extra is not None and element == 6:
            limit_of_memory(self.extra)
        return np.full(300_000, element)

def elements(workers, extra=None, num_workers=2):
    if workers == "rows":  # taken by the threads of the kernels
        data = Dataset.from_arrays(ROWS).shard(2, 0)
    else:
        data = Dataset.range(16).map(Fill(extra), num_workers=num_workers, workers=workers)
    iterator = iter(data.batch(2).prefetch(1))
    try:
        return [batch[:, -1].tolist() for batch in iterator]
    finally:
        iterator.close()

ROWS = np.repeat(np.arange(16), 2 * 40_000).reshape(32, 40_000)
RIGHT = [[2 * k, 2 * k + 1] for k in range(8)]

def use(where, workers, extra):
    began = time.monotonic()
    try:
        if where == "program":
            limit_of_memory(extra)
            found = elements(workers)
        else:
            found = elements(workers, extra)
    except ALLOWED as error:
        outcome = type(error).__name__
    else:
        outcome = "done"
        assert found == RIGHT, found
    assert time.monotonic() - began < 25, "too slow"
    if where == "program":
        resource.setrlimit(resource.RLIMIT_AS, NO_LIMIT)
    assert elements(workers) == RIGHT
    return outcome

def main():
    for extra in EXTRAS:
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(45, exit=True)
            sys.stderr.write(f"{extra} {use(WHERE, WORKERS, extra)}\\n")
            return
        end = time.monotonic() + 60
        while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
            time.sleep(0.01)
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        # 127: the C library ends a program in which a thread finds no memory for the thread-local
        # data of a library (NumPy's, say), and prints so.
        if os.waitstatus_to_exitcode(found[1]) not in (0, 127):
            print(WHERE, WORKERS, extra, found[1], flush=True)

if __name__ == "__main__":
    assert elements("threads", num_workers=0) == RIGHT
    assert elements("rows") == RIGHT
    gc.freeze()  # the processes exit faster
    main()
"""


def broken(tmp_path, where, workers, extras):
    """Return the failures and the output of the program."""
    path = tmp_path / "program.py"
    path.write_text(f"WHERE, WORKERS, EXTRAS = {where!r}, {workers!r}, {extras!r}\n{PROGRAM}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path)],
        capture_output=True, text=True, timeout=2400, check=False,
        env={**os.environ, "DVKERNELS_TIMEOUT_SECONDS": "10"},
    )  # fmt: skip
    return done.stdout + (done.stderr if done.returncode else ""), done.stderr


PLACES = [
    ("program", "threads"),
    ("program", "rows"),
    ("program", "processes"),
    ("worker", "processes"),
]


@pytest.mark.parametrize("extra", [8192, pytest.param(64 << 20, marks=pytest.mark.wide)])
@pytest.mark.parametrize(("where", "workers"), PLACES)
def test_map_with_almost_no_memory(tmp_path, where, workers, extra):
    found, said = broken(tmp_path, where, workers, [extra])
    assert not found, found + said


@pytest.mark.slow
@pytest.mark.parametrize(("where", "workers"), PLACES)
def test_map_with_every_amount_of_memory(tmp_path, where, workers):
    extras = [4096 * pages for pages in range(0, 120, 3)]
    extras += [size << 20 for size in (1, 2, 4, 9, 17, 26, 40, 80, 160)]
    found, said = broken(tmp_path, where, workers, extras)
    assert not found, found + said
