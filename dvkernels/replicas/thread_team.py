"""Thread team of a strategy: one thread per replica, kept alive between steps.

Replica 0 runs on the thread that called ``run``, the others on threads of the team. The threads do
not refer to the strategy, so they end when it is dropped.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from dvkernels.replicas import step_state, thread_limits
from dvkernels.replicas.gates import Gates
from dvkernels.threads import thread as threads

__all__: list[str] = []

Task = Callable[[], int]

_JOIN_SECONDS = 5.0
_LOOK_UP_SECONDS = 1.0  # how often an idle thread checks that its team still exists


class _Inbox:
    """Slot for one thread's next task, and the gate that opens when it is filled."""

    __slots__ = ("gate", "gates", "next_gate", "pid", "task", "team")

    def __init__(
        self, gates: Gates, gate: int, next_gate: int | None, team: weakref.ref[ThreadTeam]
    ) -> None:
        self.task: Task | None = None
        self.next_gate = next_gate
        self.gates = gates
        self.gate = gate
        self.team = team
        self.pid = os.getpid()

    def take(self, opening: int) -> Task:
        """Open a gate, unless it is negative, while waiting for the next task; return the task."""
        task = None
        while task is None:  # the gate of a step that was interrupted may have no task behind it
            is_open = self.gates.wait(self.gate, _LOOK_UP_SECONDS, opening=opening)
            opening = -1
            while not is_open:
                # The team was dropped, perhaps by an interrupt; or the last task forked, and this
                # is the child, which never gets another. Checked here, not for each task: a call
                # there holds the GIL when the caller needs it (19 us became 35).
                if self.team() is None or self.pid != os.getpid():
                    return _end
                is_open = self.gates.sleep(self.gate, _LOOK_UP_SECONDS)
            self.gates.close(self.gate)
            task, self.task = self.task, None
            if self.next_gate is not None:
                self.gates.open(self.next_gate)
        return task


class ThreadTeam:
    """Team of threads for replicas 1 to n - 1 of a step, and the gates between all n replicas.

    Each thread leaves ``share`` threads to BLAS, OpenMP and Numba; None: as many as they like.

    The threads end when the team is dropped. Only :meth:`stop` joins them: a finalizer must not
    wait, and an interrupt during it would be lost.
    """

    def __init__(self, num_replicas: int, share: int | None) -> None:
        first = step_state.num_gates(num_replicas)  # after the gates of the rendezvous
        self._gates = Gates(first + num_replicas - 1, num_replicas)
        self._is_chain = not self._gates.spins
        self.is_busy = False  # set by the runner of a step
        self.has_ended = [False] * num_replicas  # by replica: its thread has ended
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
                args=(inbox, self.has_ended, rank, share),
                name=f"dvkernels-replica-{rank}",
                daemon=True,
            )
            for rank, inbox in enumerate(self._inboxes, start=1)
        ]
        self._pid = os.getpid()
        self._at_drop = weakref.finalize(self, _end_all, self._inboxes, self._pid)
        threads.start(self._threads)

    def closed_gates(self) -> Gates:
        """Return the gates of the team, closed for the rendezvous of a new step."""
        self._gates.close_first(step_state.num_gates(len(self.has_ended)))
        return self._gates

    def start(self, tasks: Sequence[Task]) -> None:
        """Start one task on each (idle) thread; a task never raises, and returns a gate to open."""
        for inbox, task in zip(self._inboxes, tasks, strict=True):
            inbox.task = task
        if self._is_chain:
            self._gates.open(self._inboxes[0].gate)
            return
        *others, last = self._inboxes
        for inbox in others:
            self._gates.open(inbox.gate)
        self._gates.open_and_let_run(last.gate, step_state.rest_gate(len(self.has_ended)))

    def dismiss(self) -> None:
        """Tell the threads to end after their current task, without waiting.

        After this, dropping the team runs no Python code: an interrupt that strikes in a weak
        reference's callback (ours, or the one that ``threading`` keeps for each thread) is lost.
        Each thread keeps itself alive until it ends.
        """
        self._threads = []
        _end_all(self._inboxes, self._pid)
        self._at_drop.detach()  # last: after an interrupt before this, the finalizer ends them

    def stop(self) -> None:
        """End the idle threads, and join them."""
        _end_all(self._inboxes, self._pid)
        if sys.is_finalizing():
            return  # they run no more
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(_JOIN_SECONDS)


def _end() -> int:
    """Stand for the end of a thread, in place of a task."""
    return -1


def _work(inbox: _Inbox, has_ended: list[bool], rank: int, share: int | None) -> None:
    try:
        num_lowered, gate = 0, -1
        while True:
            task: Any = inbox.take(gate)
            if task is _end:
                return
            if share is not None and num_lowered < len(thread_limits.settings):
                num_lowered = thread_limits.lower(share, num_lowered)
            gate = task()
            del task  # keep no object of the user alive while waiting
    finally:
        has_ended[rank] = True  # read by replicas that wait for this one


thread_limits.entrances[_work.__code__] = False


def _end_all(inboxes: list[_Inbox], pid: int) -> None:
    if pid != os.getpid():
        return  # the threads live in the process that this one was forked from
    for inbox in inboxes:
        inbox.task = _end
        inbox.gates.open(inbox.gate)
