"""Steps with too little memory or without threads end, with a result or an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs limits and /proc")

# Forks a process for each limit. There a strategy is used under the limit, and again without it.
PROGRAM = """
import faulthandler, gc, os, resource, signal, sys, time
import numpy as np
import dvkernels as dv

here = dv.get_replica_context
STEPS = {
    "nothing": lambda: None,
    "all_reduce": lambda: here().all_reduce("sum", np.ones(3)),
    "async": lambda: here().all_reduce_async("sum", np.ones(3)).wait(),
    "merge_call": lambda: here().merge_call(lambda strategy: 1),
    "write": lambda: variable.assign_add(np.ones(3)),
    "raises": lambda: {}[1],
}

def limit_of_memory(extra):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + extra, resource.RLIM_INFINITY))

def no_limit_of_memory():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def limit_of_threads(more):
    if os.geteuid() == 0:  # the limit does not apply to root
        os.setgid(54321)
        os.setuid(54321)
    own = len(os.listdir("/proc/self/task"))
    resource.setrlimit(resource.RLIMIT_NPROC, (own + more, own + more))

def total():
    return float(here().all_reduce("sum", np.ones(3))[0])

def total_in_background():
    return float(here().all_reduce_async("sum", np.ones(3)).wait()[0])

for name in ("all_reduce", "async", "merge_call", "write"):
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as first:
        with first.scope():
            variable = dv.Variable(np.zeros(3), aggregation="sum")
        first.run(STEPS[name])

def use(kind, is_warm, extra):
    global variable
    strategy = dv.MirroredStrategy([f"cpu:{k}" for k in range(3)])
    with strategy.scope():
        variable = dv.Variable(np.zeros(3), aggregation="sum")
    if is_warm:
        strategy.run(lambda: None)
    STARVE(extra)
    began = time.monotonic()
    try:
        strategy.run(STEPS[kind])
    except Exception:
        pass
    assert time.monotonic() - began < 12, "too slow"
    if STARVE is limit_of_memory:
        no_limit_of_memory()
        assert strategy.run(total)[2] == 3
        assert strategy.run(total_in_background)[2] == 3
        first, *others = variable.values
        assert all((other == first).all() for other in others)
    strategy.close()

def main():
    for is_warm in (False, True):
        for kind in KINDS or STEPS:
            for extra in EXTRAS:
                child = os.fork()
                if child == 0:
                    faulthandler.dump_traceback_later(25, exit=True)
                    sys.stderr.write(f"{kind} {is_warm} {extra}\\n")
                    use(kind, is_warm, extra)
                    return
                end = time.monotonic() + 30
                while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
                    time.sleep(0.005)
                    if time.monotonic() > end:
                        os.kill(child, signal.SIGKILL)
                if found[1] != 0:
                    print(kind, is_warm, extra, os.waitstatus_to_exitcode(found[1]), flush=True)

gc.freeze()  # the processes exit faster
main()
"""


def broken(limit, extras, kinds=()):
    """Return the failures and the output of the program."""
    program = f"EXTRAS, KINDS = {extras!r}, {kinds!r}\n" + PROGRAM.replace("STARVE", limit)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=1200, check=False,
        env={**os.environ, "DVKERNELS_TIMEOUT_SECONDS": "3"},
    )  # fmt: skip
    return done.stdout, done.stderr


def test_steps_with_almost_no_memory():
    found, said = broken("limit_of_memory", [8192], ["async", "write"])
    assert not found, found + said


def test_steps_when_no_thread_can_start():
    found, said = broken("limit_of_threads", [0], ["async", "write"])
    assert not found, found + said
    assert "Exception in thread" not in said, said  # it has become another user meanwhile


@pytest.mark.slow
def test_every_amount_of_memory():
    extras = [4096 * pages for pages in range(0, 40, 3)]
    extras += [256 << 10, 1 << 20, 4 << 20, 9 << 20, 17 << 20, 40 << 20]
    found, said = broken("limit_of_memory", extras)
    assert not found, found + said


@pytest.mark.slow
def test_every_number_of_threads():
    found, said = broken("limit_of_threads", [0, 1, 2, 3, 4])
    assert not found, found + said
