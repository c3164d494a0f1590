"""A thread that carries out collectives behind the replicas' backs, one after another."""

from __future__ import annotations

import os
import queue
import weakref
from collections.abc import Callable

from dvkernels.threads import thread

__all__: list[str] = []

Job = Callable[[], None]


class _Queue:
    """Jobs, and whether a thread is there to run them; the thread holds nothing else."""

    __slots__ = ("__weakref__", "is_served", "jobs", "vacancy")

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.vacancy = [None]  # taken by the one thread that serves, on that thread
        self.is_served = False


class ProgressThread:
    """Runs jobs in the order they are given; its thread is made at the first one.

    The thread ends when the carrier is dropped. It holds the queue only, and a job never raises.
    An interrupt at any point of :meth:`carry` leaves the carrier as good as before: the job may
    then wait in the queue until the next one is given.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._queue = _Queue()
        weakref.finalize(self, _end, self._queue, os.getpid())
        self._pid = os.getpid()  # last: an interrupt before this leaves it to be done again

    @property
    def is_served(self) -> bool:
        """Whether a thread of this process runs what is in the queue."""
        return self._queue.is_served and self._pid == os.getpid()

    def carry(self, job: Job) -> None:
        """Run a job soon; RuntimeError if there is no thread to be had."""
        if self._pid != os.getpid():
            self._forget()  # the thread stayed in the process that this one was forked from
        self._queue.jobs.put(job)
        if not self._queue.is_served:
            # Several callers may come here at once. Of their threads one stays.
            worker = thread.Thread(
                target=_work, args=(self._queue,), name="dvkernels-replica-carrier", daemon=True
            )
            thread.start([worker])

    def stop(self) -> None:
        """End the thread after the jobs it was given."""
        _end(self._queue, self._pid)


def _work(mine: _Queue) -> None:
    pid = os.getpid()
    is_needed = True
    while is_needed and pid == os.getpid():
        try:
            mine.vacancy.pop()
        except IndexError:
            return  # another thread serves
        mine.is_served = True
        try:
            _serve(mine.jobs, pid)
        finally:
            mine.is_served = False
            mine.vacancy.append(None)
        is_needed = not mine.jobs.empty()  # given by somebody who still saw it served


def _serve(jobs: queue.SimpleQueue[Job | None], pid: int) -> None:
    while pid == os.getpid():  # a job may fork: in that process nobody gives any more
        job = jobs.get()
        if job is None:
            return
        job()
        del job  # keep nothing of the user's alive while waiting


def _end(mine: _Queue, pid: int) -> None:
    if pid == os.getpid():
        mine.jobs.put(None)
