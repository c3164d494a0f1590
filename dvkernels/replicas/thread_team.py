"""The threads of a strategy: one per replica, kept alive between steps.

Replica 0 runs on the thread that called ``run``, the others on threads of the crew. They hold no
reference to the strategy, so dropping it ends them.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from dvkernels.replicas import rendezvous
from dvkernels.replicas.gates import Gates
from dvkernels.replicas.progress_thread import ProgressThread
from dvkernels.threads import thread as threads

__all__: list[str] = []

_JOIN_SECONDS = 5.0
_LOOK_UP_SECONDS = 1.0  # how often an idle thread asks whether its crew still exists


class _Inbox:
    """One slot for a task, and the gate its thread waits at."""

    __slots__ = ("gate", "gates", "next_gate", "owner", "pid", "task")

    def __init__(
        self, gates: Gates, gate: int, next_gate: int | None, owner: weakref.ref[ThreadTeam]
    ) -> None:
        self.task: Callable[[], None] | None = None
        self.next_gate = next_gate
        self.gates = gates
        self.gate = gate
        self.owner = owner
        self.pid = os.getpid()

    def take(self) -> Callable[[], None]:
        task = None
        while task is None:  # the gate of a step that was interrupted may have no task behind it
            is_open = self.gates.wait(self.gate, _LOOK_UP_SECONDS)
            while not is_open:
                # Its crew was dropped, by an interrupt perhaps; or the last task forked, and this
                # is the child, where nobody brings another. Asked here, not for each task: a call
                # there holds the interpreter's lock when the caller needs it (19 us became 35).
                if self.owner() is None or self.pid != os.getpid():
                    return _end
                is_open = self.gates.sleep(self.gate, _LOOK_UP_SECONDS)
            self.gates.close(self.gate)
            task, self.task = self.task, None
            if self.next_gate is not None:
                self.gates.open(self.next_gate)
        return task


class ThreadTeam:
    """Threads for the replicas 1 to n - 1 of a step, and the gates between all n of them.

    The threads end when the crew is dropped. Only :meth:`stop` waits for that: what garbage
    collection calls must not wait, and an interrupt during it would be lost.
    """

    def __init__(self, num_replicas: int) -> None:
        first = rendezvous.num_gates(num_replicas)  # before it come the gates of the step
        self._gates = Gates(first + num_replicas - 1, num_replicas)
        self._num_replicas = num_replicas
        self._is_chain = not self._gates.spins
        self.is_busy = False  # set by whoever runs a step with it
        self._dead = [False] * num_replicas  # whose thread has ended
        self._inboxes = [
            _Inbox(
                self._gates,
                first + k,
                first + k + 1 if self._is_chain and k + 2 < num_replicas else None,
                weakref.ref(self),
            )
            for k in range(num_replicas - 1)
        ]
        self._threads = [
            threads.Thread(
                target=_work,
                args=(inbox, self._dead, rank),
                name=f"dvkernels-replica-{rank}",
                daemon=True,
            )
            for rank, inbox in enumerate(self._inboxes, start=1)
        ]
        self._pid = os.getpid()
        self._at_drop = weakref.finalize(self, _end_all, self._inboxes, self._pid)
        threads.start(self._threads)

    def step(
        self,
        timeout: float,
        carrier: ProgressThread,
        first_replica: int = 0,
        announce: Callable[[BaseException], None] | None = None,
    ) -> rendezvous.Rendezvous:
        """Return a new step between these threads and the caller; ``timeout`` in seconds."""
        self._gates.close_first(rendezvous.num_gates(self._num_replicas))
        return rendezvous.Rendezvous(
            self._num_replicas,
            self._gates,
            timeout,
            carrier,
            first_replica,
            announce,
            self._dead,
        )

    def start(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Start one task on each thread; a task never raises, and the thread is idle before."""
        for inbox, task in zip(self._inboxes, tasks, strict=True):
            inbox.task = task
        if self._is_chain:
            self._gates.open(self._inboxes[0].gate)
            return
        *others, last = self._inboxes
        for inbox in others:
            self._gates.open(inbox.gate)
        self._gates.open_and_let_run(last.gate, rendezvous.rest_gate(self._num_replicas))

    def dismiss(self) -> None:
        """Tell the threads to end after what they do now, and do not wait.

        After this, dropping the crew runs no Python code: an interrupt that strikes in a weak
        reference's callback (ours, or the one that ``threading`` keeps for each thread) is lost.
        Each thread holds itself until it ends, so forgetting it here is no drop.
        """
        self._threads = []
        _end_all(self._inboxes, self._pid)
        self._at_drop.detach()  # last: an interrupt before this leaves the ending to the drop

    def stop(self) -> None:
        """End the threads, which are idle, and wait until they have ended."""
        _end_all(self._inboxes, self._pid)
        if sys.is_finalizing():
            return  # they run no more
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(_JOIN_SECONDS)


def _end() -> None:
    """Tell a thread to end."""


def _work(inbox: _Inbox, dead: list[bool], rank: int) -> None:
    try:
        while True:
            task: Any = inbox.take()
            if task is _end:
                return
            task()
            del task  # keep nothing of the user's alive while waiting
    finally:
        dead[rank] = True  # whoever waits for it looks


def _end_all(inboxes: list[_Inbox], pid: int) -> None:
    if pid != os.getpid():
        return  # the threads live in the process that this one was forked from
    for inbox in inboxes:
        inbox.task = _end
        inbox.gates.open(inbox.gate)
