"""Processes that apply one function to elements.

They are spawned, never forked: a child forked from a process with OpenMP threads may end or hang.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

from dvkernels.data.outcome import Outcome, outcomes_of

__all__ = ["apply", "start"]


def start(count: int, pickled: bytes) -> Executor:
    """Return processes that have a function, which was pickled."""
    return ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_install,
        initargs=(pickled,),
    )


_installed: Callable[[Any], Any] | None = None  # in a worker process


def _install(pickled: bytes) -> None:
    global _installed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _installed = pickle.loads(pickled)


def _end_with_parent() -> None:
    """End this process when its parent is gone: a killed one cannot say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def apply(elements: Sequence[Any]) -> list[Outcome]:
    """Return what the function makes of some elements: called in a worker process."""
    assert _installed is not None
    outcomes = outcomes_of(_installed, elements)
    for place, outcome in enumerate(outcomes):
        if outcome.error is not None and not _travels(outcome.error):
            error = RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}")
            outcomes[place] = Outcome(None, error)
    return outcomes


def _travels(error: Exception) -> bool:
    """Return whether an error survives the way between processes: not all do."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True
