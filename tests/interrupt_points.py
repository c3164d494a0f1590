"""Ctrl-C at every point where CPython looks for signals: function entries and returns of C calls.

A program is Python text. What stands at its top runs once, before anything is interrupted (imports,
a first call that compiles). It defines ``make()``, which returns two functions:

* ``act()`` is what is interrupted;
* ``check(was_raised)`` is the law: it raises if something is wrong after that. ``was_raised`` says
  whether KeyboardInterrupt came out of ``act``.

For each point a process of its own is forked, which calls ``make``, then ``act`` with an interrupt
at that point of the main thread, then ``check``, and then ends as any program does. What it must
not do is hang, at its end neither: then the stacks of all its threads are in the report::

    broken = interrupt_points.broken_in(PROGRAM, sample=40)
    assert not broken, broken.text()

Threads that the top of the program has started are not in the forked processes; start them in
``make``. A number comes with each point, so that ``at=[17]`` looks at one again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SECONDS_TO_END = 12.0  # of a process; its waits have a deadline of a few seconds
PATIENCE_SECONDS = "3"  # DVKERNELS_TIMEOUT_SECONDS there
MOST_SECONDS = 3600.0  # for all points


class Broken(NamedTuple):
    """What went wrong at one point."""

    at: int
    what: str  # hangs, law, other error, lost, died
    said: str


class Report(list[Broken]):
    """The points where something went wrong; empty if all is well.

    Attributes
    ----------
    num_points : int
        That ``act`` has when nobody interrupts it.
    num_struck : int
        How many were interrupted.
    slowest_seconds : float
    """

    num_points = 0
    num_struck = 0
    slowest_seconds = 0.0

    def text(self) -> str:
        """Return all of it for a message."""
        told = [f"point {one.at} {one.what}: {one.said}" for one in self]
        head = f"{len(self)} of {self.num_struck} points (of {self.num_points}) are broken"
        return "\n\n".join([head, *told[:5]])


def broken_in(
    program: str,
    *,
    sample: int | None = None,
    at: Sequence[int] | None = None,
    may_be_lost: bool = False,
    seconds_to_end: float = SECONDS_TO_END,
) -> Report:
    """Interrupt a program at its points, and return what went wrong.

    Parameters
    ----------
    program : str
    sample : int, optional
        So many points, evenly spread; all of them if not given.
    at : sequence of int, optional
        These points.
    may_be_lost : bool
        An interrupt that ``act`` survives is no error (``act`` catches it, say). One that strikes
        in a callback of the collector's or a ``__del__`` is lost by Python itself, and never one.
    seconds_to_end : float
        How long one process may take.
    """
    asked = {"sample": sample, "at": at, "may_be_lost": may_be_lost, "seconds": seconds_to_end}
    served = f"{program}\nimport interrupt_points\ninterrupt_points.serve(make, {asked!r})\n"
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", served],
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
        env={
            "DVKERNELS_TIMEOUT_SECONDS": PATIENCE_SECONDS,
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        },
    )
    if done.returncode != 0:
        raise AssertionError(f"the program failed before any interrupt:\n{done.stderr}")
    *lines, last = done.stdout.splitlines()
    report = Report(Broken(*json.loads(line)) for line in lines)
    report.num_points, report.num_struck, report.slowest_seconds = json.loads(last)
    return report


class Striking:
    """Raises KeyboardInterrupt at one point of a call, and counts the points.

    Also for use by itself, in a process that a hang may end.
    """

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.count = 0
        self.has_struck = False

    def call(self, act: Callable[[], object]) -> None:
        """Call ``act``; the interrupt comes out of this as it comes out of ``act``."""
        here = sys._getframe()

        def look(frame: Any, event: str, called: Any) -> None:
            if frame is here or event not in ("call", "c_return"):
                return
            if self.count == self.at:
                sys.setprofile(None)
                self.has_struck = True
                code = frame.f_code
                name = getattr(called, "__qualname__", "") if event == "c_return" else "its entry"
                where = f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}, {name}"
                os.write(2, f"struck at {where}\n".encode())
                raise KeyboardInterrupt
            self.count += 1

        gc.disable()  # a collection would add points now and then, and lose what strikes in it
        try:
            sys.setprofile(look)
            act()
        finally:
            sys.setprofile(None)
            gc.enable()


def serve(make: Callable[[], Any], asked: dict[str, Any]) -> None:
    """Fork a process for each point, and print what went wrong; returns in those processes."""
    gc.collect()
    gc.freeze()  # so the ends of the processes are five times as quick
    count = _in_a_child(make, None, asked)
    if count is None:
        return
    num_points = count["count"]
    if count["what"]:
        raise SystemExit(f"{count['what']}: {count['said']}")
    if asked["at"] is not None:
        points: Any = asked["at"]
    else:
        # The number of points varies where threads wait for each other: somewhat more than that.
        sample = asked["sample"]
        everything = range(num_points + 10)
        points = everything if sample is None else everything[:: max(1, num_points // sample)]
    num_struck, slowest = 0, 0.0
    for at in points:
        told = _in_a_child(make, at, asked)
        if told is None:
            return
        num_struck += told["has_struck"]
        slowest = max(slowest, told["seconds"])
        if told["what"]:
            print(json.dumps([at, told["what"], told["said"]]), flush=True)
    print(json.dumps([num_points, num_struck, slowest]), flush=True)


def _in_a_child(
    make: Callable[[], Any], at: int | None, asked: dict[str, Any]
) -> dict[str, Any] | None:
    """Return what a forked process tells of one point; None in that process, after it."""
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as said:
        sys.stdout.flush()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            faulthandler.enable(sys.__stderr__)
            _one_point(make, at, asked["may_be_lost"], os.dup(told.fileno()))
            return None
        is_ended, status = False, 0
        while not is_ended and time.monotonic() < began + asked["seconds"]:
            pid, status = os.waitpid(child, os.WNOHANG)
            is_ended = pid != 0
            if not is_ended:
                time.sleep(0.002)
        seconds = time.monotonic() - began
        if not is_ended:
            os.kill(child, signal.SIGABRT)  # tells the stacks of all threads
            time.sleep(0.2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        told.seek(0)
        said.seek(0)
        text = told.read()
        result: dict[str, Any] = {"count": 0, "has_struck": True, "what": "", "said": ""}
        result |= {"seconds": seconds} | (json.loads(text) if text else {})
        if not is_ended:
            result["what"] = "hangs at its end" if text else "hangs"
        elif status != 0 and not result["what"]:
            result["what"] = f"died with status {os.waitstatus_to_exitcode(status)}"
        if result["what"]:
            stacks = said.read().partition("Extension modules:")[0]
            result["said"] = f"{result['said']}\n{stacks[-6000:]}"
        return result


def _one_point(make: Callable[[], Any], at: int | None, may_be_lost: bool, told: int) -> None:
    """Interrupt ``act`` at a point and look at the law; tell of it in a file."""
    lost_by_python = []
    sys.unraisablehook = lambda lost: lost_by_python.append(lost.exc_type)
    act, check = make()
    striking = Striking(at)
    was_raised, what, said = False, "", ""
    try:
        striking.call(act)
    except KeyboardInterrupt:
        was_raised = True
    except BaseException:
        what, said = "raises another error", traceback.format_exc()
    is_lost = striking.has_struck and not was_raised
    if is_lost and not what and not may_be_lost and KeyboardInterrupt not in lost_by_python:
        what = "loses the interrupt"
    if not what:
        try:
            check(was_raised)
        except BaseException:
            what, said = "breaks its law", traceback.format_exc()
    result = {"count": striking.count, "has_struck": striking.has_struck}
    os.write(told, json.dumps(result | {"what": what, "said": said}).encode())
    os.close(told)
