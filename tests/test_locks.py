"""Locks and interrupts: no interrupt may leave a lock taken.

Since CPython 3.14 a signal handler may raise after ``with lock:`` has taken the lock and before its
block is guarded (python/cpython#148874). So a lock that the main thread can reach is an RLock taken
inside ``try`` and released in ``finally``, or better no lock at all.
"""

from __future__ import annotations

import ast
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent / "dvkernels"
MAKERS = {"Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "allocate_lock"}

# Modules that take a lock by ``with``, and why the main thread's interrupts may not matter there.
EXCEPTIONS = {
    "kernels/cpu/engine/thread_pool.py": "beyond_interrupts starts the helpers, on another thread",
    "kernels/cuda/engine/cuda_target.py": "numba-cuda is imported by beyond_interrupts, too",
    "kernels/cuda/engine/simulator.py": "it is for tests, and runs one kernel at a time",
    "kernels/numba_import.py": "modules are imported by beyond_interrupts, on a thread of its own",
}


def _name_of(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _targets(node):
    if isinstance(node, ast.Assign):
        return [part for target in node.targets for part in getattr(target, "elts", [target])]
    return [node.target] if isinstance(node, ast.AnnAssign) else []


@functools.cache
def taken_by_with(house):
    """Return the modules that take a lock by ``with``, with line numbers."""
    locks, taken = set(), []
    for path in sorted(house.rglob("*.py")):
        module = path.relative_to(house).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.With):
                taken += [(module, node.lineno, _name_of(i.context_expr)) for i in node.items]
            elif _targets(node) and node.value is not None:
                calls = [part for part in ast.walk(node.value) if isinstance(part, ast.Call)]
                if any(_name_of(call.func) in MAKERS for call in calls):
                    locks |= {_name_of(target) for target in _targets(node)}
    found = {}
    for module, line, name in taken:
        if name in locks:
            found.setdefault(module, []).append(line)
    return found


def test_no_lock_that_the_main_thread_can_reach_is_taken_by_with():
    found = taken_by_with(HOUSE)
    unexpected = {module: lines for module, lines in found.items() if module not in EXCEPTIONS}
    assert not unexpected, f"take the lock inside try, and release it in finally: {unexpected}"


def test_the_list_of_exceptions_is_minimal():
    assert not set(EXCEPTIONS) - set(taken_by_with(HOUSE))


def test_a_lock_taken_by_with_is_found(tmp_path):
    (tmp_path / "one.py").write_text(
        "import threading\n"
        "_lock = threading.RLock()\n"
        "class Box:\n"
        "    def __init__(self):\n"
        "        self.mutex, self.other = threading.Lock(), 1\n"
        "    def use(self, file):\n"
        "        with self.mutex, file:\n"
        "            pass\n"
        "        with file:\n"
        "            pass\n"
    )
    (tmp_path / "two.py").write_text("import one\nwith one._lock:\n    pass\n")
    assert taken_by_with(tmp_path) == {"one.py": [7], "two.py": [2]}


STORM = """
import signal, sys, threading, time
class Struck(Exception):
    pass
def strike(*_):
    raise Struck
signal.signal(signal.SIGALRM, strike)
num_struck = num_held = 0
end = time.monotonic() + SECONDS
while time.monotonic() < end:
    lock = threading.RLock() if IS_CURED else threading.Lock()
    try:
        signal.setitimer(signal.ITIMER_REAL, 3e-5)
        while True:
            LOOP
    except Struck:
        num_struck += 1
    if IS_CURED:
        other = []
        thread = threading.Thread(target=lambda: other.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join()
        num_held += not other[0]
    else:
        num_held += lock.locked()
print(num_struck, num_held)
"""
BY_WITH = """
            with lock:
                pass"""
BY_HAND = """
            try:
                lock.acquire()
            finally:
                try:
                    lock.release()
                except RuntimeError:
                    pass"""


def storm(loop, is_cured, seconds=1):
    """Return how many interrupts hit a loop that takes a lock, and how many left it taken."""
    program = STORM.replace("LOOP", loop.strip()).replace("IS_CURED", str(is_cured))
    done = subprocess.run(
        [sys.executable, "-c", program.replace("SECONDS", str(seconds))],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return tuple(map(int, done.stdout.split()))


needs_timers = pytest.mark.skipif(
    not hasattr(signal, "setitimer") or os.name != "posix", reason="needs POSIX timers"
)


@needs_timers
def test_whether_this_interpreter_loses_a_lock_taken_by_with():
    num_struck, num_held = storm(BY_WITH, is_cured=False)
    assert num_struck > 100
    if not num_held:
        pytest.skip(f"no lock stayed taken after {num_struck} interrupts: it lacks the defect")
    assert sys.version_info >= (3, 14), f"{num_held} of {num_struck} interrupts left it taken"


@needs_timers
def test_locks_as_the_package_takes_them_survive_interrupts():
    num_struck, num_held = storm(BY_HAND, is_cured=True)
    assert num_struck > 100
    assert num_held == 0
