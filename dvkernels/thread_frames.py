"""Frames of all threads, found without a deadlock of CPython 3.11."""

from __future__ import annotations

import functools
import gc
import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

__all__: list[str] = []

T = TypeVar("T")


def current_frames() -> dict[int, FrameType]:
    """Return the topmost frame of each thread, by its identity.

    CPython 3.11 holds a lock meanwhile that every new thread needs. If a collection then runs a
    finalizer, which gives the GIL away, and the thread that gets it starts a thread, each waits for
    the other forever. So nothing is collected meanwhile.
    """
    return _uncollected(sys._current_frames)


def back_of(frame: FrameType) -> FrameType | None:
    """Return ``frame.f_back``, for a frame of another thread.

    CPython 3.11 makes the frame object now. If a collection then gives the GIL away, that thread
    goes on, and the object refers to memory that it has left: the process has crashed so.
    """
    back: FrameType | None = _uncollected(functools.partial(getattr, frame, "f_back"))
    return back


def stack_of(frame: FrameType) -> list[FrameType]:
    """Return the frames of another thread, from this one on, the innermost first."""
    frames = [frame]
    while (back := back_of(frames[-1])) is not None:
        frames.append(back)
    return frames


def locals_of(frame: FrameType) -> dict[str, Any]:
    """Return the present local variables of a frame of another thread."""
    found: dict[str, Any] = _uncollected(functools.partial(getattr, frame, "f_locals"))
    return dict(found)


def _uncollected(call: Callable[[], T]) -> T:
    """Return what a C function returns; nothing is collected meanwhile."""
    if not gc.isenabled():
        return call()
    calls: tuple[Callable[[], Any], ...] = (gc.disable, call, gc.enable)
    try:
        # One operation of the interpreter: no other thread and no interrupt comes in between.
        _, result, _ = map(operator.call, calls)
    except BaseException:  # no memory
        gc.enable()
        raise
    found: T = result
    return found
