"""The helper threads: they join the jobs of any caller, and no caller depends on them.

A caller offers its job, then works on it until no piece is left. Helpers claim pieces when they
wake. A caller therefore waits only for pieces that a running helper has claimed: it cannot
deadlock, two callers progress together, and a forked child without helpers still computes.
"""

from __future__ import annotations

import collections
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dvkernels.devices import cpu
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels.cpu import elementwise

__all__ = ["execute", "num_threads"]

_Offer = tuple[elementwise.Runner, Any, Any]

# 100 to 300 us of spinning, the last piece of a helper twice over; then sleep, and free the core.
_NUM_PAUSES = 10_000
_SLEEP_SECONDS = 50e-6
_DEADLINE_SECONDS = 600.0


def num_threads() -> int:
    """Return how many threads may work on a call: the usable cores, or DVKERNELS_NUM_THREADS."""
    wanted = os.environ.get("DVKERNELS_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else cpu.usable_cores()


class _Pool:
    """Daemon threads over one queue; started when first needed."""

    def __init__(self) -> None:
        self.offers: queue.SimpleQueue[_Offer] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.num_helpers = -1  # not started

    def start(self) -> None:
        with self.lock:
            if self.num_helpers >= 0:
                return
            num_helpers = num_threads() - 1
            for k in range(num_helpers):
                name = f"dvkernels-kernel-{k}"
                threading.Thread(target=_help, args=(self.offers,), name=name, daemon=True).start()
            self.num_helpers = num_helpers

    def offer(self, offer: _Offer) -> None:
        if self.num_helpers < 0:
            self.start()
        # Helpers that are busy elsewhere would find a long queue of finished jobs.
        if self.offers.qsize() < 4 * self.num_helpers:
            for _ in range(self.num_helpers):
                self.offers.put(offer)


def _help(offers: queue.SimpleQueue[_Offer]) -> None:
    while True:
        runner, witness, job = offers.get()
        runner(job, witness, 0)
        del job


_pool = _Pool()


def _renew() -> None:
    """Forget the threads, and whoever held the lock: a fork left them in the parent."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def execute(
    runner: elementwise.Runner,
    witness: Any,
    job: Any,
    shared: bool,
    copies: Sequence[tuple[Any, Any]] = (),
) -> None:
    """Run ``job``, with helpers if ``shared``, then copy each ``(target, source)`` of ``copies``.

    It runs to its end once it has begun: an exception from a signal handler (Ctrl-C) waits.
    """
    interrupted: BaseException | None = None
    offered = not shared
    while True:
        try:
            if not offered:
                offered = True
                _pool.offer((runner, witness, job))
            if not runner(job, witness, _NUM_PAUSES):
                _sleep_until_done(job)
            if copies:  # a loop in C: no signal is handled between two of them
                targets, sources = zip(*copies, strict=True)
                collections.deque(map(np.copyto, targets, sources), maxlen=0)
            break
        except CollectiveTimeoutError:
            raise
        except BaseException as error:
            if interrupted is not None and isinstance(error, Exception):
                raise
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _sleep_until_done(job: Any) -> None:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while job[elementwise.DONE] < job[elementwise.NUM_PIECES]:
        if time.monotonic() > deadline:
            raise CollectiveTimeoutError(
                f"a helper thread has held a piece for {_DEADLINE_SECONDS:.0f} s: was it stopped?"
            )
        time.sleep(_SLEEP_SECONDS)
