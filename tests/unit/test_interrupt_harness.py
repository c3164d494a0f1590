"""The interrupt harness finds each program that is known to be broken, and no other."""

from __future__ import annotations

import interrupt_points
import pytest

CLEAN = """
def make():
    held = []
    def act():
        held.append(len("abc"))
    def check(was_raised):
        assert held == ([3] if not was_raised else held[:1])
    return act, check
"""
KEEPS_A_LOCK = """
import threading
def make():
    lock = threading.Lock()
    def act():
        lock.acquire()
        len("abc")
        lock.release()
    def check(was_raised):
        with lock:
            pass
    return act, check
"""
MARKS_AND_STARTS = """
def make():
    marks = []
    def act():
        marks.append(1)
        marks.pop()
    def check(was_raised):
        assert not marks
    return act, check
"""
ENDS_NEVER = """
import threading
def make():
    stop = threading.Lock()
    stop.acquire()
    thread = threading.Thread(target=stop.acquire)
    def act():
        len("abc")
        stop.release()
    def check(was_raised):
        thread.start()
    return act, check
"""
SWALLOWS = """
def make():
    def act():
        try:
            len("abc")
        except KeyboardInterrupt:
            pass
    return act, lambda was_raised: None
"""


@pytest.mark.parametrize(
    ("program", "found"),
    [
        (CLEAN, set()),
        (KEEPS_A_LOCK, {"hangs"}),
        (MARKS_AND_STARTS, {"breaks its law"}),
        pytest.param(ENDS_NEVER, {"hangs at its end"}, marks=pytest.mark.wide),
        (SWALLOWS, {"loses the interrupt"}),
    ],
)
def test_each_broken_program_is_found(program, found):
    broken = interrupt_points.broken_in(program, seconds_to_end=1)
    assert broken.num_struck > 1
    assert {one.what for one in broken} == found, broken.text()
    assert len(broken) < broken.num_struck
