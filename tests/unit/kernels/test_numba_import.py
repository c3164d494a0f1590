"""Import of Numba under interrupts and forks."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
from kinds import daily

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def _python(program: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "DVKERNELS_TIMEOUT_SECONDS": "60"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


CHILD = """
import os, sys, threading
import numpy as np
from dvkernels import kernels

def fork_and_reduce():
    child = os.fork()
    if child == 0:
        buffers = [np.ones(4, np.int16), np.full(4, 2, np.int16)]
        kernels.all_reduce(buffers, "max")
        os._exit(0 if (buffers[0] == 2).all() else 1)
    ended = threading.Timer(60, os.kill, (child, 9))
    ended.start()
    assert os.waitpid(child, 0)[1] == 0
    ended.cancel()
"""

WHILE_LOADING = f"""{CHILD}
def load():
    if sys.argv[1] == "ours":
        kernels.all_reduce([np.ones(4), np.ones(4)])
    else:
        import numba

thread = threading.Thread(target=load)
thread.start()
while sys.argv[2] not in sys.modules:
    pass
fork_and_reduce()
thread.join()
"""


@needs_fork
@pytest.mark.parametrize(
    ("who", "at"),
    daily(
        [*itertools.product(["ours", "theirs"], ["numba", "numba.core.types"])],
        ("ours", "numba.core.types"),
        ("theirs", "numba"),
    ),
)
def test_a_child_forked_while_numba_is_imported_computes(who: str, at: str) -> None:
    _python(WHILE_LOADING, who, at)


WHILE_COMPILING = f"""{CHILD}
kernels.all_reduce([np.ones(4), np.ones(4)])
from llvmlite.binding import ffi
from numba.core.compiler_lock import global_compiler_lock

taken, forking = threading.Event(), threading.Event()

def compile_something():
    with global_compiler_lock, ffi.lib._lock:
        taken.set()
        forking.wait(60)

os.register_at_fork(before=forking.set)  # hooks before a fork run in reverse order
thread = threading.Thread(target=compile_something)
thread.start()
taken.wait(60)
fork_and_reduce()
thread.join()
fork_and_reduce()  # the parent has released all locks
"""


@needs_fork
def test_a_child_forked_while_another_thread_compiles_computes() -> None:
    _python(WHILE_COMPILING)


INTERRUPTED = """
import sys, threading
import numpy as np
from dvkernels import kernels

at, seen = int(sys.argv[1]), 0

def strike(frame, event, argument):
    global seen
    seen += 1
    if seen == at:
        sys.setprofile(None)
        raise KeyboardInterrupt

buffers = [np.ones(9), np.ones(9)]
sys.setprofile(strike)
try:
    kernels.all_reduce(buffers)
except KeyboardInterrupt:
    pass
sys.setprofile(None)
assert buffers[0][0] in (1, 2)
buffers = [np.ones(9), np.ones(9)]
kernels.all_reduce(buffers)
assert buffers[1][0] == 2
print(seen)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, 1200, 60))
def test_the_first_call_of_a_process_can_be_interrupted_anywhere(at: int) -> None:
    _python(INTERRUPTED, at)
