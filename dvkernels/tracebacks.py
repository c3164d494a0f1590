"""Tracebacks without the frames of this package, so that users see the lines that they wrote.

``DVKERNELS_TRACEBACK=full`` keeps all frames.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

__all__ = ["PACKAGE", "VARIABLE", "boundary", "of_users", "rendered", "trim"]

VARIABLE = "DVKERNELS_TRACEBACK"
PACKAGE = str(Path(__file__).parent) + os.sep

# What starts programs and launched functions: even an error without a line of theirs hides it.
_STARTERS = (
    f"{PACKAGE}launcher{os.sep}worker.py",
    f"{PACKAGE}launcher{os.sep}function_worker.py",
    "<frozen runpy>",
    str(Path(os.__file__).with_name("runpy.py")),
)

_LINKS = ("__traceback__", "__cause__", "__context__")

R = TypeVar("R")
P = ParamSpec("P")


def of_users(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of this package; if no others are left, with them."""
    if os.environ.get(VARIABLE) == "full":
        return trace
    return _without_own(trace) or _without_starters(trace)


def trim(error: BaseException) -> None:
    """Take the frames of this package from the tracebacks of an error and of its causes.

    For ``except BaseException as error: trim(error); raise`` in the outermost function of the
    package: the frame that raises again is not added.
    """
    if os.environ.get(VARIABLE) == "full":
        return
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        link = pending.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            # The base class's attributes: a user's class may use the names for something else.
            trace, *others = (getattr(BaseException, name).__get__(link) for name in _LINKS)
            BaseException.with_traceback(link, _without_own(trace))
            pending += others


def boundary(function: Callable[P, R]) -> Callable[P, R]:
    """Make a public function trim the errors that leave it; for functions that take long."""

    @functools.wraps(function)
    def trimmed(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            trim(error)
            raise

    return trimmed


def rendered(error: BaseException) -> list[str]:
    """Return the text of an error in IPython and notebooks."""
    from IPython import get_ipython

    trim(error)
    shown: Any = get_ipython().InteractiveTB
    text: list[str] = shown.structured_traceback(type(error), error, error.__traceback__)
    return text


def _without_own(trace: TracebackType | None) -> TracebackType | None:
    kept = []
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(PACKAGE) and name not in _STARTERS:
            kept.append(trace)
        trace = trace.tb_next
    found: TracebackType | None = None
    for each in reversed(kept):
        found = TracebackType(found, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return found


def _without_starters(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename in _STARTERS:
        trace = trace.tb_next
    return trace
