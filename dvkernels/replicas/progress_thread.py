"""Progress thread: performs asynchronous collectives in the background, one after another."""

from __future__ import annotations

import os
import queue
import weakref
from collections.abc import Callable

from dvkernels.threads import thread
from dvkernels.threads.claim import Claim

__all__: list[str] = []

Job = Callable[[], None]


class _Queue:
    """Job queue, the only object that the thread refers to."""

    __slots__ = ("__weakref__", "is_served", "jobs", "vacancy")

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.vacancy = Claim()  # taken by the one thread that serves
        self.is_served = False


class ProgressThread:
    """Background thread that runs jobs in order; started by the first job.

    The thread ends when this object is dropped: it refers to the queue only. A job never raises.
    An interrupt at any point of :meth:`submit` leaves this object usable: the job may then wait in
    the queue until the next one is submitted.
    """

    def __init__(self) -> None:
        self._reset_after_fork()

    def _reset_after_fork(self) -> None:
        self._queue = _Queue()
        weakref.finalize(self, _end, self._queue, os.getpid())
        self._pid = os.getpid()  # last: after an interrupt before this, it is done again

    @property
    def is_served(self) -> bool:
        """Whether a thread of this process runs the jobs in the queue."""
        return self._queue.is_served and self._pid == os.getpid()

    def carry(self, job: Job) -> None:
        """Run a job in the background; RuntimeError if no thread can be started."""
        if self._pid != os.getpid():
            self._reset_after_fork()  # the thread stayed in the parent process
        self._queue.jobs.put(job)
        if not self._queue.is_served:
            # Several callers may come here at once; one of their threads stays.
            worker = thread.Thread(
                target=_work, args=(self._queue,), name="dvkernels-replica-progress", daemon=True
            )
            thread.start([worker])

    def stop(self) -> None:
        """End the thread after the submitted jobs."""
        _end(self._queue, self._pid)


def _work(state: _Queue) -> None:
    pid = os.getpid()
    is_needed = True
    while is_needed and pid == os.getpid():
        if not state.vacancy.take():
            return  # another thread serves
        state.is_served = True
        try:
            _serve(state.jobs, pid)
        finally:
            state.is_served = False
            state.vacancy.give_back()
        is_needed = not state.jobs.empty()  # submitted by a caller that still saw is_served


def _serve(jobs: queue.SimpleQueue[Job | None], pid: int) -> None:
    while pid == os.getpid():  # a job may fork: in the child nobody submits any more
        job = jobs.get()
        if job is None:
            return
        job()
        del job  # keep no object of the user alive while waiting


def _end(state: _Queue, pid: int) -> None:
    if pid == os.getpid():
        state.jobs.put(None)
