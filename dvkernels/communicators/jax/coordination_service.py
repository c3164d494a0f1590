"""Transport of messages between the processes of ``jax.distributed``, by its coordination service.

The service is a store of keys in process 0, which every process reaches. A vote of a control round,
with the bytes that belong to it, is one key; whoever waits for it is woken when it is set. So this
is for messages, and for arrays in host memory; those on devices go by XLA's collectives.
"""

from __future__ import annotations

import atexit
import itertools
import os
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, final

import jax
import numpy as np

from dvkernels.cluster import procfs
from dvkernels.cluster.process_handle import ProcessHandle
from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.consistency import (
    FailureState,
    Fingerprint,
    Vote,
    fingerprint_of,
)
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.communicators.workers.shm.symmetric_memory import Columns
from dvkernels.communicators.workers.transport import Transport, text_of_exit
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import ClusterError, WorkerLostError
from dvkernels.kernels import backends
from dvkernels.reduce_op import Reduction
from dvkernels.user_errors import text_of

__all__: list[str] = []

_HEADER = struct.Struct("<qqq")  # of a vote: its number, its bytes, and the bytes of its text
_SLICE_MS = 250  # how long a wait sleeps in the service, where no interrupt reaches it
_SECONDS_TO_FINISH = 10.0  # the last program, for a worker that has left
_NUM_CHANNELS = 2
_PROGRAM = fingerprint_of("a program of JAX")

_groups = itertools.count()  # of this process: all processes make theirs in the same order
_members: weakref.WeakSet[CoordinationTransport] = weakref.WeakSet()


def connect(timeout_seconds: float) -> WorkerGroup:
    """Return the group of all processes of ``jax.distributed``; every process must call this.

    Raises
    ------
    ClusterError
        The program has not called ``jax.distributed.initialize()``.
    CollectiveTimeoutError
        A process does not call this in time.
    """
    client = _client()
    if client is None:
        raise ClusterError(
            "JAX counts several processes, and has no coordination service: call "
            "jax.distributed.initialize() before the first device of JAX is used"
        )
    store = Store(client, f"dvkernels/{next(_groups)}")
    rank, size = jax.process_index(), jax.process_count()
    transport = CoordinationTransport(store, rank, size, timeout_seconds)
    group = WorkerGroup(transport)
    pid = os.getpid()
    process = (procfs.this_host(), procfs.this_process_namespace(), pid, procfs.start_time_of(pid))
    transport.watch(group.exchange(process, "TPUStrategy"))
    if not _members:
        atexit.unregister(_leave_at_exit)
        atexit.register(_leave_at_exit)
    _members.add(transport)
    return group


def _client() -> Any:
    try:
        from jax._src import distributed  # there is no public name for it

        return distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise ClusterError(
            f"JAX {jax.__version__} keeps its coordination service where this version does not "
            f"look, which was tested with JAX 0.6.1 to 0.10.2: {text_of(error)}; install one of "
            f"these"
        ) from error


def _leave_at_exit() -> None:
    for transport in [*_members]:
        if not transport.has_closed:
            transport.leave(text_of_exit())


@final
class Store:
    """Keys of one group in the coordination service; also the record of the group's end."""

    def __init__(self, client: Any, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._end: tuple[int, str] | None = None

    def set(self, key: str, value: bytes) -> None:
        """Set a key that has not been set."""
        self._client.key_value_set_bytes(f"{self._prefix}/{key}", value)

    def get(self, key: str, milliseconds: int) -> bytes | None:
        """Return the value of a key, once it is set; None after the time."""
        try:
            value: bytes = self._client.blocking_key_value_get_bytes(
                f"{self._prefix}/{key}", milliseconds
            )
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise
        return value

    def items(self, folder: str) -> dict[str, bytes]:
        """Return the values of all keys of a folder that are set."""
        found = self._client.key_value_dir_get_bytes(f"{self._prefix}/{folder}/")
        return {key.rpartition("/")[2]: value for key, value in found}

    def delete(self, key: str) -> None:
        """Delete a key."""
        self._client.key_value_delete(f"{self._prefix}/{key}")

    def end(self, kind: int, text: str) -> None:
        """Abort all calls of the group, pending and later ones; the first end stays."""
        try:
            self.set("end/why", f"{kind}{text}".encode(errors="replace"))
        except jax.errors.JaxRuntimeError:  # somebody was faster, or the service is gone
            self._end = self.why_ended() or (kind, text)

    def why_ended(self) -> tuple[int, str] | None:
        """Return kind and text of the end; None if the group has not ended."""
        if self._end is None:
            try:
                found = self.items("end").get("why")
            except jax.errors.JaxRuntimeError:
                return None
            if found is not None:
                self._end = int(found[:1]), found[1:].decode()
        return self._end


@final
class CoordinationTransport(Transport):
    """Transport between the processes of ``jax.distributed``."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout_seconds: float,
        *,
        channel: int = 0,
        failures: FailureState | None = None,
    ) -> None:
        super().__init__(rank, size, timeout_seconds, store, channel, failures)
        self._store = store
        self._staged = b""
        self._votes: dict[int, bytes] = {}  # of the current round, by worker
        self._processes: dict[int, ProcessHandle] = {}  # the workers of this host
        pid = os.getpid()
        self.on_close = lambda text: self.leave(text) if os.getpid() == pid else None
        if channel + 1 < _NUM_CHANNELS:
            self._duplicate = CoordinationTransport(
                store, rank, size, timeout_seconds, channel=channel + 1, failures=self._failures
            )

    def watch(self, processes: list[tuple[int, int, int, int]]) -> None:
        """Notice from now on if a process of this host ends; those of others JAX watches."""
        own = processes[self.rank]
        for worker, (host, namespace, pid, started) in enumerate(processes):
            if worker != self.rank and (host, namespace) == own[:2]:
                self._processes[worker] = ProcessHandle(pid, started)
        if isinstance(self._duplicate, CoordinationTransport):
            self._duplicate._processes = self._processes

    # -- arrays -----------------------------------------------------------------------------------

    def all_reduce_into(
        self, columns: Columns, num_sources: int, op: Reduction, call: Fingerprint, divisor: int = 1
    ) -> None:
        """Reduce the sources in rank order, so that all workers get the same bits."""
        ((source, target),) = columns
        parts = self.all_gather_bytes(source.view(np.uint8), call)
        reduced = backends.cpu().reduce_unchecked([part.view(source.dtype) for part in parts], op)
        target[...] = reduced

    def all_gather_bytes(self, source: HostArray, call: Fingerprint) -> list[HostArray]:
        """Return the bytes of all workers, whose numbers may differ."""
        return [np.frombuffer(bytearray(each), np.uint8) for each in self._round(call, source)]

    def broadcast_into(self, target: HostArray, root: int, call: Fingerprint) -> None:
        """Write the root's bytes to every ``target``."""
        parts = self._round(call, target if self.rank == root else target[:0])
        target[...] = np.frombuffer(parts[root], np.uint8)

    def _round(self, call: Fingerprint, source: HostArray) -> list[bytes]:
        """Return what all workers have staged, once all have voted for the same call."""
        data = source.tobytes()

        def stage() -> None:
            self._staged = data

        with self._consistency:
            self._consistency.agree(call, len(data), stage)
            self._last = call
            return [self._votes[worker][_HEADER.size :] for worker in range(self.size)]

    # -- rounds -----------------------------------------------------------------------------------

    def arrive(self, number: int, nbytes: int, text: str = "") -> None:
        """Vote in the next round, with what is staged or with a text."""
        staged, self._staged = self._staged, b""
        note = text.encode(errors="replace")
        self._number += 1
        self._votes = {}
        self._ask(self._store.set, self._key(self._number, self.rank),
                  _HEADER.pack(number, nbytes, len(note)) + (note or staged))  # fmt: skip
        if self._number > 2:  # all have voted in the last round, so they have read the one before
            self._ask(self._store.delete, self._key(self._number - 2, self.rank))

    def is_complete(self) -> bool:
        """Return whether all workers have arrived in the current round."""
        folder = f"{self._channel}/{self._number}"
        found = self._ask(self._store.items, folder)
        self._votes |= {int(worker): vote for worker, vote in found.items()}
        return len(self._votes) == self.size

    def await_all(self, call: Fingerprint) -> list[Vote]:
        """Wait for the votes of all workers in the current round."""
        began = time.monotonic()
        for worker in range(self.size):
            while worker not in self._votes:
                key = self._key(self._number, worker)
                vote = self._ask(self._store.get, key, _SLICE_MS)
                if vote is not None:
                    self._votes[worker] = vote
                    break
                self._check_absent(call, time.monotonic() - began)
        return [Vote(*_HEADER.unpack_from(self._votes[w])[:2]) for w in range(self.size)]

    def await_program(self, is_done: Callable[[], bool]) -> None:
        """Wait for a program of all workers; XLA does not notice each loss of a process.

        Raises ``CollectiveTimeoutError`` and ``WorkerLostError``, which end the group.
        """
        if not wait.until(is_done, wait.JAX_PROGRAM, self.timeout_seconds, self._check_others):
            absent = [worker for worker in range(self.size) if worker != self.rank]
            self._give_up(absent, _PROGRAM, "the program that they run together has not ended")

    def text_of(self, worker: int) -> str:
        """Return the text of a worker's vote in the latest round."""
        vote = self._votes[worker]
        length = _HEADER.unpack_from(vote)[2]
        return vote[_HEADER.size : _HEADER.size + length].decode()

    def _key(self, number: int, worker: int) -> str:
        return f"{self._channel}/{number}/{worker}"

    def _ask(self, request: Callable[..., Any], *about: Any) -> Any:
        """Return the answer of the service; abort the group if there is none."""
        try:
            return request(*about)
        except jax.errors.JaxRuntimeError as error:
            self.end(
                WorkerLostError(f"the coordination service of JAX, in worker 0: {text_of(error)}")
            )
            raise self._end_error() from error

    def _check_absent(self, call: Fingerprint, waited_seconds: float) -> None:
        """Abort the group if an absent worker can never arrive, or is late."""
        if self.is_complete():
            return
        absent = [worker for worker in range(self.size) if worker not in self._votes]
        self._check_alive(absent, call)
        if waited_seconds > self.timeout_seconds:
            self._give_up(absent, call, "nothing is known of them")

    def _check_others(self, waited_seconds: float) -> None:
        workers = [worker for worker in range(self.size) if worker != self.rank]
        # One that leaves after its last program has launched it, and XLA may be at work.
        self._check_alive(workers, _PROGRAM, may_leave=waited_seconds < _SECONDS_TO_FINISH)

    def _check_alive(
        self, workers: Sequence[int], call: Fingerprint, may_leave: bool = False
    ) -> None:
        """Abort the group if it has ended, or one of these workers is gone."""
        if self._record.why_ended() is not None:
            raise self._end_error()
        left = {} if may_leave else self._ask(self._store.items, "left")
        for worker in workers:
            if why := left.get(str(worker)):
                self._lose(worker, call, why.decode())
            if worker in self._processes and not self._processes[worker].is_alive():
                self._lose(worker, call, "its process has ended without a word: was it killed?")

    # -- the end ----------------------------------------------------------------------------------

    def leave(self, text: str) -> None:
        """Tell the other workers that this worker makes no further call, and why."""
        try:
            self._store.set(f"left/{self.rank}", text.encode(errors="replace"))
        except jax.errors.JaxRuntimeError:  # the service is gone, or knows it
            return

    def remaining_workers(self) -> list[int]:
        """Return the other workers that have not left, as far as is known."""
        left = self._ask(self._store.items, "left")
        return [w for w in range(self.size) if w != self.rank and str(w) not in left]
