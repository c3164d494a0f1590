"""Ctrl-C at every point where CPython looks for signals: function entries and returns of C calls.

A program is Python text. Its module level runs once, before any interrupt (imports, a first call
that compiles). It defines ``make()``, which returns two functions:

* ``act()`` is the code to interrupt;
* ``check(was_raised)`` is the law: it raises if the state afterwards is wrong. ``was_raised`` says
  whether ``act`` raised KeyboardInterrupt.

For each point a process is forked, which calls ``make``, then ``act`` with an interrupt at that
point of the main thread, then ``check``, and then exits normally. If it hangs, even at exit, the
report shows the stacks of all its threads::

    broken = interrupt_points.broken_in(PROGRAM, sample=40)
    assert not broken, broken.text()

Threads started at module level are missing in the forked processes; start them in ``make``. Each
point has a number, so that ``at=[17]`` repeats one point.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fork_server

SECONDS_TO_END = 12.0  # of one process; its waits have a timeout of a few seconds
TIMEOUT_SECONDS = "3"  # DVKERNELS_TIMEOUT_SECONDS of the processes
MOST_SECONDS = 3600.0  # for all points
OPAQUE: tuple[str, ...] = ()  # ends of the file names of doubles of C; set by a program


class Broken(NamedTuple):
    """A failure at one point of interruption."""

    at: int
    what: str  # hangs, law, other error, lost, died
    details: str


class Report(list[Broken]):
    """The failed points; empty if all are well.

    Attributes
    ----------
    num_points : int
        The number of points of ``act`` without an interrupt.
    num_struck : int
        The number of points that were interrupted.
    slowest_seconds : float
        The duration of the slowest process.
    """

    num_points = 0
    num_struck = 0
    slowest_seconds = 0.0

    def text(self) -> str:
        """Return the report as text."""
        lines = [f"point {one.at} {one.what}: {one.details}" for one in self]
        head = f"{len(self)} of {self.num_struck} points (of {self.num_points}) are broken"
        return "\n\n".join([head, *lines[:5]])


def broken_in(
    program: str,
    *,
    sample: int | None = None,
    at: Sequence[int] | None = None,
    may_be_lost: bool = False,
    seconds_to_end: float = SECONDS_TO_END,
) -> Report:
    """Interrupt a program at each of its points, and return the failures.

    Parameters
    ----------
    program : str
        The text of the program.
    sample : int, optional
        The number of points, evenly spread; all points if not given.
    at : sequence of int, optional
        The numbers of the points.
    may_be_lost : bool
        An interrupt that ``act`` catches is no failure. An interrupt in a callback of the garbage
        collector or a ``__del__`` is dropped by Python itself, and is never a failure.
    seconds_to_end : float
        The timeout of one process.
    """
    asked = {"sample": sample, "at": at, "may_be_lost": may_be_lost, "seconds": seconds_to_end}
    served = f"{program}\nimport interrupt_points\ninterrupt_points.serve(make, {asked!r})\n"
    here = Path(__file__).parent
    paths = [str(here), str(here / "doubles"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "DVKERNELS_TIMEOUT_SECONDS": TIMEOUT_SECONDS,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    done = fork_server.run(served, timeout=MOST_SECONDS, **environment)
    if done.returncode != 0:
        raise AssertionError(f"the program failed before any interrupt:\n{done.stderr}")
    *lines, last = done.stdout.splitlines()
    report = Report(Broken(*json.loads(line)) for line in lines)
    report.num_points, report.num_struck, report.slowest_seconds = json.loads(last)
    return report


def _events_of(frame: Any) -> tuple[str, ...]:
    """Return the events of a frame at which CPython may run a handler of signals.

    A double whose module is in ``OPAQUE`` stands for C: only its return is such an event.
    """
    if not OPAQUE:
        return ("call", "c_return")
    if frame.f_code.co_filename.endswith(OPAQUE):
        is_inside = frame.f_back.f_code.co_filename.endswith(OPAQUE)
        return () if is_inside else ("return",)
    return ("call", "c_return")


class Striking:
    """Profile hook that raises KeyboardInterrupt at one point of a call, and counts the points.

    May be used alone, in a process that a hang may end.
    """

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.count = 0
        self.has_struck = False

    def call(self, act: Callable[[], object]) -> None:
        """Call ``act``, and let the interrupt through."""
        here = sys._getframe()

        def look(frame: Any, event: str, called: Any) -> None:
            if frame is here or event not in _events_of(frame):
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

        gc.disable()  # a collection would add points at random, and drop an interrupt in a callback
        try:
            sys.setprofile(look)
            act()
        finally:
            sys.setprofile(None)
            gc.enable()


def strike_in_turn(act: Callable[[], object], number: int) -> Iterator[None]:
    """Call ``act`` with an interrupt at each of its points in turn; yield after each call.

    All points, and then again, until so many interrupts have struck.
    """
    num_struck = at = 0
    while num_struck < number:
        striking = Striking(at)
        with contextlib.suppress(KeyboardInterrupt):
            striking.call(act)
        num_struck += striking.has_struck
        at = at + 1 if striking.has_struck else 0
        yield


def serve(make: Callable[[], Any], asked: dict[str, Any]) -> None:
    """Fork a process for each point, and print the failures; returns in those processes."""
    gc.collect()
    gc.freeze()  # the processes exit five times as fast
    count = _in_a_child(make, None, asked)
    if count is None:
        return
    num_points = count["count"]
    if count["what"]:
        raise SystemExit(f"{count['what']}: {count['details']}")
    if asked["at"] is not None:
        points: Any = asked["at"]
    else:
        # The number of points varies where threads wait for each other, hence some more.
        sample = asked["sample"]
        everything = range(num_points + 10)
        points = everything if sample is None else everything[:: max(1, num_points // sample)]
    num_struck, slowest = 0, 0.0
    for at in points:
        outcome = _in_a_child(make, at, asked)
        if outcome is None:
            return
        num_struck += outcome["has_struck"]
        slowest = max(slowest, outcome["seconds"])
        if outcome["what"]:
            print(json.dumps([at, outcome["what"], outcome["details"]]), flush=True)
    print(json.dumps([num_points, num_struck, slowest]), flush=True)


def _in_a_child(
    make: Callable[[], Any], at: int | None, asked: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the report of a forked process about one point; None in that process."""
    with tempfile.TemporaryFile("w+") as outcome, tempfile.TemporaryFile("w+") as stderr:
        sys.stdout.flush()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(stderr.fileno(), 2)
            faulthandler.enable(sys.__stderr__)
            _one_point(make, at, asked["may_be_lost"], os.dup(outcome.fileno()))
            return None
        is_ended, status = False, 0
        while not is_ended and time.monotonic() < began + asked["seconds"]:
            pid, status = os.waitpid(child, os.WNOHANG)
            is_ended = pid != 0
            if not is_ended:
                time.sleep(0.002)
        seconds = time.monotonic() - began
        if not is_ended:
            os.kill(child, signal.SIGABRT)  # faulthandler prints the stacks of all threads
            time.sleep(0.2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        outcome.seek(0)
        stderr.seek(0)
        text = outcome.read()
        result: dict[str, Any] = {"count": 0, "has_struck": True, "what": "", "details": ""}
        result |= {"seconds": seconds} | (json.loads(text) if text else {})
        if not is_ended:
            result["what"] = "hangs at its end" if text else "hangs"
        elif status != 0 and not result["what"]:
            result["what"] = f"died with status {os.waitstatus_to_exitcode(status)}"
        if result["what"]:
            stacks = stderr.read().partition("Extension modules:")[0]
            result["details"] = f"{result['details']}\n{stacks[-6000:]}"
        return result


def _one_point(make: Callable[[], Any], at: int | None, may_be_lost: bool, outcome: int) -> None:
    """Interrupt ``act`` at a point, check the law, and write the outcome to a file."""
    lost_by_python = []
    sys.unraisablehook = lambda lost: lost_by_python.append(lost.exc_type)
    act, check = make()
    striking = Striking(at)
    was_raised, what, details = False, "", ""
    try:
        striking.call(act)
    except KeyboardInterrupt:
        was_raised = True
    except BaseException:
        what, details = "raises another error", traceback.format_exc()
    is_lost = striking.has_struck and not was_raised
    if is_lost and not what and not may_be_lost and KeyboardInterrupt not in lost_by_python:
        what = "loses the interrupt"
    if not what:
        try:
            check(was_raised)
        except BaseException:
            what, details = "breaks its law", traceback.format_exc()
    result = {"count": striking.count, "has_struck": striking.has_struck}
    os.write(outcome, json.dumps(result | {"what": what, "details": details}).encode())
    os.close(outcome)
