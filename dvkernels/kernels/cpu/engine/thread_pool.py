"""Pool of helper threads, which join the jobs of any caller; no caller depends on them.

A caller posts its job, then works on it until no piece is left; helpers that see the job claim
pieces of it. A caller waits only for helpers that are inside its job: it cannot deadlock, two
callers progress together, and a forked child without helpers still computes.

Posting and joining happen in compiled code, without the GIL: a helper that is awake joins within a
microsecond. After a while without work it parks, and waking it takes 30 to 100 us. Threads that
spin for something else, as replicas that wait for a collective do, join jobs meanwhile: they are
awake, and hold the cores that helpers would need.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import types

from dvkernels import deadlines
from dvkernels.devices import cpu
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import intrinsics, records
from dvkernels.kernels.cpu.engine.job_layout import COUNTER_WORDS, first_counter, job_at
from dvkernels.schedules import cost_model
from dvkernels.threads import shielded, thread

__all__: list[str] = []


Copies = Sequence[tuple[HostArray, HostArray]]  # (target, source)

_NUM_SLOTS = 8
NUM_LOCKS = 64


class _PoolHead(NamedTuple):
    num_asleep: int  # helpers
    num_guests: int  # threads that spin for something else, and join jobs meanwhile


class _JobSlot(NamedTuple):
    job: int  # its address; 0: none; its address, negative: it is closed, and helpers are inside


class _Crew(NamedTuple):
    num_inside: int  # helpers, in the job of a slot


class _Helper(NamedTuple):
    is_asleep: int


# The words of a pool: the head, the slots, their crews, the helpers. Each crew and helper has a
# cache line, so that threads do not share lines falsely. The slots lie on one line together, which
# idle threads watch: a line takes 0.1 us from core to core, on some machines 0.3 to 1, so a job and
# the news of it are one word.
_HEAD = records.layout(_PoolHead, alone=_PoolHead._fields)
_CREW, _HELPER = (records.layout(kind, nbytes=records.LINE_NBYTES) for kind in (_Crew, _Helper))
_head_at = records.view(_HEAD)
_slot_at = records.nth(records.layout(_JobSlot))
_crew_at, _helper_at = records.nth(_CREW), records.nth(_HELPER)
_SLOTS = _HEAD.itemsize  # offsets in bytes
_CREWS = _SLOTS + records.LINE_NBYTES
_HELPERS = _CREWS + _NUM_SLOTS * _CREW.itemsize
# Indices of words that Python reads.
_NUM_ASLEEP = records.index(_HEAD, "num_asleep")
_NUM_GUESTS = records.index(_HEAD, "num_guests")
_FIRST_SLOT = _SLOTS // 8

# Bytes moved from which on a job is shared, and from which on helpers are woken for it.
SHARED_NBYTES = cost_model.CPU.sharing_pays_from()
_WAKING_NBYTES = cost_model.CPU.sharing_pays_from(asleep=True)
# A helper without work for 100 us (a pause is 20 to 45 ns) parks: a call in a loop finds it awake,
# a training step of milliseconds has its core for itself.
_IDLE_PAUSES = 4_000
# A caller spins for 100 to 300 us, twice the time of a helper's last piece; then it sleeps.
_SETTLE_PAUSES = 10_000
_SLEEP_SECONDS = 50e-6
_RECHECK_SECONDS = 10.0  # how often a helper checks for a wake-up lost to an interrupt


def num_threads() -> int:
    """Return the most threads of a call: DVKERNELS_NUM_THREADS, or the number of usable cores."""
    wanted = os.environ.get("DVKERNELS_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else cpu.usable_cores()


@jit.njit(nogil=True)
def help_out(pool):  # type: ignore[no-untyped-def]
    """Join every posted job once.

    The job is read again after the helper is counted as inside: its caller waits for it from then.
    """
    for k in range(_NUM_SLOTS):
        slot = _slot_at(pool + _SLOTS, k)
        if intrinsics.load_shared(slot, "job") > 0:
            crew = _crew_at(pool + _CREWS, k)
            intrinsics.fetch_add(crew, "num_inside", 1)
            job = intrinsics.load_shared(slot, "job")
            if job > 0:
                intrinsics.call(job_at(job).runner, job)
            intrinsics.fetch_add(crew, "num_inside", -1)


@jit.njit(nogil=True)
def has_jobs(pool):  # type: ignore[no-untyped-def]
    """Return whether a job is posted."""
    for k in range(_NUM_SLOTS):
        if intrinsics.load_shared(_slot_at(pool + _SLOTS, k), "job") > 0:
            return True
    return False


@jit.njit(nogil=True)
def count_guests(pool, change):  # type: ignore[no-untyped-def]
    """Count threads that come, or go: they spin for something else, and join jobs meanwhile."""
    intrinsics.fetch_add(_head_at(pool), "num_guests", change)


@jit.njit(called_with="(int64, int64, int64)", nogil=True)
def _serve(pool, helper, num_pauses):  # type: ignore[no-untyped-def]
    """Help until no job was posted for ``num_pauses``; True: marked asleep, the caller parks."""
    head = _head_at(pool)
    turn = 0
    while turn < num_pauses:
        if has_jobs(pool):
            help_out(pool)
            turn = 0
        turn += 1
        intrinsics.relax(turn)
    intrinsics.fetch_add(head, "num_asleep", 1)
    intrinsics.store_shared(_helper_at(pool + _HELPERS, helper), "is_asleep", 1)
    if has_jobs(pool):
        return not _mark_awake(pool, helper)
    return True


@jit.njit(called_with="(int64, int64)", nogil=True)
def _mark_awake(pool, helper):  # type: ignore[no-untyped-def]
    """Mark a helper awake; False if it already was: exactly one thread wakes a sleeper."""
    if intrinsics.exchange(_helper_at(pool + _HELPERS, helper), "is_asleep", 0) == 0:
        return False
    intrinsics.fetch_add(_head_at(pool), "num_asleep", -1)
    return True


@jit.njit(called_with="(int64, int64, int64)", nogil=True)
def _settle(pool, number, num_pauses):  # type: ignore[no-untyped-def]
    """Wait until no helper is inside a closed job, and free its slot.

    Return 0, or ``number + 1`` if ``num_pauses`` were too few.
    """
    crew = _crew_at(pool + _CREWS, number)
    for turn in range(num_pauses):
        if intrinsics.load_shared(crew, "num_inside") == 0:
            intrinsics.store_shared(_slot_at(pool + _SLOTS, number), "job", 0)
            return 0
        intrinsics.relax(turn)
    return number + 1


@jit.njit(called_with="(int64, int64, int64)", nogil=True)
def _execute(pool, job, num_pauses):  # type: ignore[no-untyped-def]
    """Run a job with the helpers that join; return the result of ``_settle``."""
    runner = job_at(job).runner
    for number in range(_NUM_SLOTS):
        slot = _slot_at(pool + _SLOTS, number)
        if intrinsics.compare_exchange(slot, "job", 0, job) == 0:
            intrinsics.call(runner, job)
            intrinsics.store_shared(slot, "job", -job)
            return _settle(pool, number, num_pauses)
    intrinsics.call(runner, job)  # more callers than slots: alone
    return 0


@jit.njit(called_with="(int64,)", nogil=True)
def run_alone(job):  # type: ignore[no-untyped-def]
    """Run a job on this thread."""
    intrinsics.call(job_at(job).runner, job)


if hasattr(os, "sched_setaffinity"):
    _core = types.ExternalFunction("sched_getcpu", types.intc())

    @jit.njit(called_with="()")
    def _this_core():  # type: ignore[no-untyped-def]
        return _core()


def _new_words(num_helpers: int) -> HostArray:
    return intrinsics.words((_HELPERS + num_helpers * _HELPER.itemsize) // 8)


class ThreadPool:
    """Pool of daemon threads, started when first needed; fewer where no more can be started."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew: in a forked child the threads, and a holder of the lock, do not exist."""
        self.lock = threading.Lock()
        self.wake_locks: list[threading.Lock] | None = None  # not started
        self.words = _new_words(0)
        self.address = 0  # of the words, once started
        self.threads: list[threading.Thread] = []
        self.abandoned: list[HostArray] = []  # jobs that a stopped thread may still touch
        self.locks = intrinsics.words(NUM_LOCKS * COUNTER_WORDS)  # of arrays, by their addresses

    def start(self) -> None:
        """Start the helpers, on a thread that no interrupt reaches."""
        shielded.beyond_interrupts(self._start)

    def _start(self) -> None:
        with self.lock:
            if self.wake_locks is not None:
                return
            wake_locks = [threading.Lock() for _ in range(num_threads() - 1)]
            self.words = _new_words(len(wake_locks))
            self.address = checks.address(self.words)
            # Functions of rare calls are compiled now: an interrupt of a later compilation would
            # leave the compiler's lock taken.
            _settle(self.address, 0, 1)
            if wake_locks:
                _mark_awake(self.address, 0)
                _other_cores()
            helpers = []
            for helper, wake_lock in enumerate(wake_locks):
                wake_lock.acquire()
                name = f"dvkernels-kernel-{helper}"
                args = (self.words, self.address, helper, wake_lock)
                # Where no memory is left one may die before it begins, which is seen at once.
                helpers.append(thread.Thread(target=_run_helper, args=args, name=name, daemon=True))
            with contextlib.suppress(Exception):  # fewer threads, or none, could be started
                thread.start(helpers)
            self.threads = [helper for helper in helpers if helper.is_alive()]
            self.wake_locks = wake_locks[: len(self.threads)]

    def wake(self) -> None:
        """Wake the helpers that sleep."""
        other_cores = _other_cores()
        for helper, wake_lock in enumerate(self.wake_locks or ()):
            if _mark_awake(self.address, helper):
                if other_cores:
                    with contextlib.suppress(OSError):  # the process lost a core just now
                        os.sched_setaffinity(self.threads[helper].native_id or 0, other_cores)
                with contextlib.suppress(RuntimeError):  # it woke by its timeout before
                    wake_lock.release()


def _other_cores() -> set[int]:
    """Return the usable cores but this one, where the system has thread affinity.

    Linux tends to wake a thread on the core of the thread that wakes it, where the two then share
    time slices of 4 ms while another core idles: 8 replicas of 16 MiB took 8.0 ms so, in most
    rounds of a bad minute, and take 3.8 to 4.1 ms with affinity (2 cores of an AMD EPYC, 2026-11).
    Helpers run only kernels, so no thread of the user inherits their affinity.
    """
    if not hasattr(os, "sched_setaffinity"):
        return set()
    return os.sched_getaffinity(0) - {_this_core()}


def _run_helper(words: HostArray, address: int, helper: int, wake_lock: threading.Lock) -> None:
    """Run a helper thread; its argument ``words`` keeps the memory of its pool alive."""
    is_asleep = (_HELPERS + helper * _HELPER.itemsize) // 8
    while True:
        if _serve(address, helper, _IDLE_PAUSES):
            while not wake_lock.acquire(timeout=_RECHECK_SECONDS) and words[is_asleep]:
                pass


_pool = ThreadPool()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.reset)


def of_process() -> ThreadPool:
    """Return the pool of this process; its address is 0 until it is started."""
    return _pool


def wake() -> None:
    """Wake the helpers that sleep; start the pool if it has not been."""
    if _pool.wake_locks is None:
        _pool.start()
    _pool.wake()


def execute(job: HostArray, address: int, moved: int, copies: Copies = ()) -> None:
    """Run the job at ``address``, with helpers if sharing pays for ``moved`` bytes.

    Then copy each ``(target, source)`` of ``copies``. The job runs to its end once it has begun:
    an exception from a signal handler (Ctrl-C) is raised afterwards. ``job`` is the array of the
    words at ``address``.
    """
    pool, is_shared = _pool, moved >= SHARED_NBYTES
    if is_shared:
        if pool.wake_locks is None:
            pool.start()
        words = pool.words
        if moved >= _WAKING_NBYTES and words[_NUM_ASLEEP] > words[_NUM_GUESTS]:
            pool.wake()
    try:
        occupied = 0
        if is_shared:
            occupied = _execute(pool.address, address, _SETTLE_PAUSES)
        else:
            run_alone(address)
        if occupied or copies:
            _finish(pool, job, address, occupied, copies)
    except CollectiveTimeoutError:
        raise
    except BaseException:  # an interrupt before _finish
        slots = pool.words[_FIRST_SLOT : _FIRST_SLOT + _NUM_SLOTS].tolist()
        if -address in slots:  # a helper is still inside
            _finish(pool, job, address, 1 + slots.index(-address), copies)
        elif copies and job[first_counter(job, address)]:  # a thread has joined it
            _finish(pool, job, address, 0, copies)
        raise


def _finish(pool: ThreadPool, job: HostArray, address: int, occupied: int, copies: Copies) -> None:
    """Wait for the helpers inside the job, then copy."""
    interrupted: BaseException | None = None
    timeout = deadlines.timeout_seconds()
    deadline = time.monotonic() + timeout
    while True:
        try:
            while occupied:
                occupied = _settle(pool.address, occupied - 1, 1)
                if occupied and time.monotonic() > deadline:
                    pool.abandoned.append(job)
                    raise CollectiveTimeoutError(
                        f"a helper thread has held a piece for {timeout:.0f} s: was it stopped?"
                    )
                if occupied:
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
