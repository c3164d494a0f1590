"""A thread that carries out collectives behind the replicas' backs, one after another."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable

from dvkernels.devices import threads

__all__: list[str] = []


class Carrier:
    """Runs jobs in the order they are given; its thread is made at the first one.

    The thread ends when the carrier is dropped. It holds the queue only, and a job never raises.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_started = False
        self._mutex = threading.Lock()

    def carry(self, job: Callable[[], None]) -> None:
        """Run a job soon."""
        if self._pid != os.getpid():
            self._forget()  # the thread stayed in the process that this one was forked from
        with self._mutex:
            if not self._is_started:
                worker = threading.Thread(
                    target=_work, args=(self._jobs,), name="dvkernels-replica-carrier", daemon=True
                )
                threads.start([worker])
                weakref.finalize(self, _end, self._jobs, os.getpid())
                self._is_started = True
        self._jobs.put(job)

    def stop(self) -> None:
        """End the thread after the jobs it was given."""
        if self._pid == os.getpid():
            self._jobs.put(None)


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        job()
        del job  # keep nothing of the user's alive while waiting


def _end(jobs: queue.SimpleQueue[Callable[[], None] | None], pid: int) -> None:
    if pid == os.getpid():
        jobs.put(None)
