"""Frames of all threads, found without a deadlock of CPython 3.11."""

from __future__ import annotations

import gc
import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__: list[str] = []


def current_frames() -> dict[int, FrameType]:
    """Return the topmost frame of each thread, by its identity.

    CPython 3.11 holds a lock meanwhile that every new thread needs. If a collection then runs a
    finalizer, which gives the GIL away, and the thread that gets it starts a thread, each waits for
    the other forever. So nothing is collected meanwhile.
    """
    if not gc.isenabled():
        return sys._current_frames()
    calls: tuple[Callable[[], Any], ...] = (gc.disable, sys._current_frames, gc.enable)
    frames: dict[int, FrameType]
    try:
        # One operation of the interpreter: no other thread and no interrupt comes in between.
        _, frames, _ = map(operator.call, calls)
    except BaseException:  # no memory
        gc.enable()
        raise
    return frames
