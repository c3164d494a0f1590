"""The helper threads: they join the jobs of any caller, and no caller depends on them.

A caller posts its job, then works on it until no piece is left; helpers claim pieces as they see
it. A caller waits only for helpers that are inside its job: it cannot deadlock, two callers
progress together, and a forked child without helpers still computes.

Posting and joining happen in compiled code, without the interpreter's lock: a helper that is awake
joins within a microsecond. After a while without work it sleeps, and waking it takes 30 to 100 us.

    words of a pool, a cache line each, so that one thread's writes disturb no other:
    [0] jobs posted   [8] helpers asleep
    [16 + 8 s] slot s: whether taken, the job, the helpers inside it
    [16 + 8 SLOTS + 8 k] helper k: whether asleep
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types

from dvkernels import deadlines
from dvkernels.devices import cpu
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import intrinsics
from dvkernels.schedules import cost_model
from dvkernels.threads import shielded
from dvkernels.threads import thread as threads

__all__ = ["SHARED_NBYTES", "execute", "help_out", "num_threads", "run_alone", "wake"]


_NUM_SLOTS = 8
_SLOTS, _HELPERS = 16, 16 + 8 * _NUM_SLOTS
_TAKEN, _JOB, _INSIDE = 0, 1, 2
# Words of a job: where its compiled code lies, and its slot and one until nobody is inside it.
_RUNNER, _HELD = 18, 22

# From how many bytes moved on others are let in, and from how many they are woken for it.
SHARED_NBYTES = cost_model.CPU.sharing_pays_from()
_WAKING_NBYTES = cost_model.CPU.sharing_pays_from(asleep=True)
# A helper that found nothing to do for 100 us (a pause is 20 to 45 ns) sleeps: a call in a loop
# finds it awake, a training step of milliseconds has its core for itself.
_IDLE_PAUSES = 4_000
# 100 to 300 us of spinning, the last piece of a helper twice over; then sleep, and free the core.
_LAST_PAUSES = 10_000
_SLEEP_SECONDS = 50e-6
_LOST_SECONDS = 10.0  # after which a helper looks whether an interrupt has swallowed its bell


def num_threads() -> int:
    """Return how many threads may work on a call: the usable cores, or DVKERNELS_NUM_THREADS."""
    wanted = os.environ.get("DVKERNELS_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else cpu.usable_cores()


@jit.njit(nogil=True)
def help_out(pool):  # type: ignore[no-untyped-def]
    """Join every posted job once. Between the two looks at a slot its job cannot vanish."""
    for slot in range(_NUM_SLOTS):
        line = pool + 8 * (_SLOTS + 8 * slot)
        if intrinsics.load_shared(line, _JOB) != 0:
            intrinsics.fetch_add(line, _INSIDE, 1)
            job = intrinsics.load_shared(line, _JOB)
            if job != 0:
                intrinsics.call(intrinsics.load(job, _RUNNER), job)
            intrinsics.fetch_add(line, _INSIDE, -1)


@jit.njit(called_with="(int64, int64, int64)", nogil=True)
def _serve(pool, helper, num_pauses):  # type: ignore[no-untyped-def]
    """Help until nothing was posted for ``num_pauses``; True: marked asleep, go and block."""
    turn = 0
    while turn < num_pauses:
        if intrinsics.load_shared(pool, 0) > 0:
            help_out(pool)
            turn = 0
        turn += 1
        intrinsics.relax(turn)
    line = pool + 8 * (_HELPERS + 8 * helper)
    intrinsics.fetch_add(pool, 8, 1)
    intrinsics.store_shared(line, 0, 1)
    if intrinsics.load_shared(pool, 0) > 0:
        return not _is_woken(pool, helper)
    return True


@jit.njit(called_with="(int64, int64)", nogil=True)
def _is_woken(pool, helper):  # type: ignore[no-untyped-def]
    """Mark a helper awake; False if it was already: exactly one thread wakes a sleeper."""
    line = pool + 8 * (_HELPERS + 8 * helper)
    if intrinsics.exchange(line, 0, 0) == 0:
        return False
    intrinsics.fetch_add(pool, 8, -1)
    return True


@jit.njit(called_with="(int64, int64, int64, int64)", nogil=True)
def _settle(pool, slot, job, num_pauses):  # type: ignore[no-untyped-def]
    """Wait until no helper is inside; 0, or ``slot + 1`` if ``num_pauses`` were too few."""
    line = pool + 8 * (_SLOTS + 8 * slot)
    for turn in range(num_pauses):
        if intrinsics.load_shared(line, _INSIDE) == 0:
            intrinsics.store(job, _HELD, 0)
            intrinsics.store_shared(line, _TAKEN, 0)
            return 0
        intrinsics.relax(turn)
    return slot + 1


@jit.njit(called_with="(int64, int64, int64)", nogil=True)
def _execute(pool, job, num_pauses):  # type: ignore[no-untyped-def]
    """Run a job with whoever joins; returns as ``_settle``."""
    intrinsics.store(job, _HELD, 0)
    for slot in range(_NUM_SLOTS):
        line = pool + 8 * (_SLOTS + 8 * slot)
        if intrinsics.compare_exchange(line, _TAKEN, 0, 1) == 0:
            intrinsics.store(job, _HELD, slot + 1)
            intrinsics.store_shared(line, _JOB, job)
            intrinsics.fetch_add(pool, 0, 1)
            intrinsics.call(intrinsics.load(job, _RUNNER), job)
            intrinsics.store_shared(line, _JOB, 0)
            intrinsics.fetch_add(pool, 0, -1)
            return _settle(pool, slot, job, num_pauses)
    intrinsics.call(intrinsics.load(job, _RUNNER), job)  # more callers than slots: alone
    return 0


@jit.njit(called_with="(int64,)", nogil=True)
def run_alone(job):  # type: ignore[no-untyped-def]
    """Run a job on this thread."""
    intrinsics.call(intrinsics.load(job, _RUNNER), job)


if hasattr(os, "sched_setaffinity"):
    _core = types.ExternalFunction("sched_getcpu", types.intc())

    @jit.njit(called_with="()")
    def _this_core():  # type: ignore[no-untyped-def]
        return _core()


class _Pool:
    """Daemon threads, started when first needed; fewer, or none, where there are none to be had."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.bells: list[threading.Lock] | None = None  # not started
        self.words = intrinsics.words(_HELPERS)
        self.address = 0
        self.threads: list[threading.Thread] = []
        self.abandoned: list[Any] = []  # jobs that a stopped thread may still touch

    def start(self) -> None:
        """Start the helpers, where no interrupt reaches it."""
        shielded.beyond_interrupts(self._start)

    def _start(self) -> None:
        with self.lock:
            if self.bells is not None:
                return
            bells = [threading.Lock() for _ in range(num_threads() - 1)]
            self.words = intrinsics.words(_HELPERS + 8 * len(bells))
            self.address = checks.address(self.words)
            # What is needed now and then is compiled now: an interrupt later in the compiler's
            # hands would leave its lock taken.
            _settle(self.address, 0, checks.address(self.words), 1)
            if bells:
                _is_woken(self.address, 0)
                _other_cores()
            helpers = []
            for helper, bell in enumerate(bells):
                bell.acquire()
                name = f"dvkernels-kernel-{helper}"
                args = (self.words, self.address, helper, bell)
                thread = threading.Thread(target=_help, args=args, name=name, daemon=True)
                helpers.append(thread)
            with contextlib.suppress(Exception):  # no thread to be had, or not as many
                threads.start(helpers)
            self.threads = [helper for helper in helpers if helper.is_alive()]
            self.bells = bells[: len(self.threads)]

    def wake(self) -> None:
        """Wake the helpers that sleep."""
        away = _other_cores()
        for helper, bell in enumerate(self.bells or ()):
            if _is_woken(self.address, helper):
                if away:
                    with contextlib.suppress(OSError):  # a core that was taken from us just now
                        os.sched_setaffinity(self.threads[helper].native_id or 0, away)
                with contextlib.suppress(RuntimeError):  # it has looked for itself
                    bell.release()


def _other_cores() -> set[int]:
    """Return the cores but this one, where the system lets threads be placed.

    Left alone, Linux tends to wake a thread on the core of the one that wakes it, where the two
    then take turns of 4 ms while another core idles: 8 replicas of 16 MiB took 8.0 ms so, in most
    rounds of a bad minute, and 3.8 to 4.1 ms since (2 cores of an AMD EPYC, 2026-11). Helpers run
    nothing but kernels, so nobody inherits where they may run.
    """
    if not hasattr(os, "sched_setaffinity"):
        return set()
    return os.sched_getaffinity(0) - {_this_core()}


def _help(words: Any, address: int, helper: int, bell: threading.Lock) -> None:
    """Run a helper; it keeps the memory of its pool alive."""
    while True:
        if _serve(address, helper, _IDLE_PAUSES):
            while not bell.acquire(timeout=_LOST_SECONDS) and words[_HELPERS + 8 * helper]:
                pass


_pool = _Pool()


def _renew() -> None:
    """Forget the threads, and whoever held the lock: a fork left them in the parent."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def wake() -> None:
    """Wake the helpers that sleep, and start them if there are none yet."""
    if _pool.bells is None:
        _pool.start()
    _pool.wake()


def execute(job: Any, address: int, moved: int, copies: Sequence[tuple[Any, Any]] = ()) -> None:
    """Run the job at ``address``, with helpers if it pays to move ``moved`` bytes together.

    Then copy each ``(target, source)`` of ``copies``. It runs to its end once it has begun: an
    exception from a signal handler (Ctrl-C) waits. ``job`` holds the words at ``address``, and
    keeps alive what they name.
    """
    pool = _pool
    if moved < SHARED_NBYTES:
        run_alone(address)
        if copies:
            _finish(pool, job, address, 0, copies)
        return
    if pool.bells is None:
        pool.start()
    if moved >= _WAKING_NBYTES and pool.words[8]:
        pool.wake()
    try:
        left = _execute(pool.address, address, _LAST_PAUSES)
        if left or copies:
            _finish(pool, job, address, left, copies)
    except CollectiveTimeoutError:
        raise
    except BaseException:  # an interrupt between the two, while a helper is still at work
        if left := int(job[_HELD]):
            _finish(pool, job, address, left, copies)
        raise


def _finish(
    pool: _Pool, job: Any, address: int, left: int, copies: Sequence[tuple[Any, Any]]
) -> None:
    """Wait for the helpers inside the job, then copy."""
    interrupted: BaseException | None = None
    patience = deadlines.timeout_seconds()
    deadline = time.monotonic() + patience
    while True:
        try:
            while left:
                left = _settle(pool.address, left - 1, address, 1)
                if left and time.monotonic() > deadline:
                    pool.abandoned.append(job)
                    raise CollectiveTimeoutError(
                        f"a helper thread has held a piece for {patience:.0f} s: was it stopped?"
                    )
                if left:
                    time.sleep(_SLEEP_SECONDS)
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
