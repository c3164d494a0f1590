"""Frames of all threads are found while other threads start and garbage is collected."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest

from dvkernels import thread_frames

# Collections run finalizers, which give the GIL away, while other threads start threads.
STARTS = """
import faulthandler, gc, sys, threading
from dvkernels import thread_frames

faulthandler.dump_traceback_later(100, exit=True)
gc.set_threshold(20, 2, 2)
sys.setswitchinterval(1e-6)
is_over = False

class Garbage:
    def __init__(self):
        self.cycle = self
    def __del__(self):
        for _ in range(50):
            pass

def start():
    while not is_over:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()

starters = [threading.Thread(target=start) for _ in range(2)]
for starter in starters:
    starter.start()
for _ in range(LOOKS):
    for _ in range(20):
        Garbage()
    thread_frames.current_frames()
is_over = True
"""


@pytest.mark.slow
def test_no_collection_holds_up_a_thread_that_starts() -> None:
    program = STARTS.replace("LOOKS", "50_000")
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_nothing_is_collected_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_current_frames", gc.isenabled)
    assert thread_frames.current_frames() is False  # type: ignore[comparison-overlap]
    assert gc.isenabled()
    monkeypatch.setattr(sys, "_current_frames", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        thread_frames.current_frames()
    assert gc.isenabled()


def test_every_thread_has_a_frame_and_collections_go_on() -> None:
    is_over = threading.Event()
    thread = threading.Thread(target=is_over.wait)
    thread.start()
    for is_enabled in (True, False):
        (gc.enable if is_enabled else gc.disable)()
        try:
            frames = thread_frames.current_frames()
            assert gc.isenabled() == is_enabled
        finally:
            gc.enable()
        assert {thread.ident, threading.get_ident()} <= set(frames)
        assert frames[threading.get_ident()].f_code.co_filename != __file__
    is_over.set()
    thread.join()
