"""Processes of a parameter-server job: the coordinator, its workers, and the servers."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import weakref
from typing import Any, final

import numpy as np

from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.cluster.resolvers import default_resolver
from dvkernels.communicators import registry as communicators
from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.context import Frame
from dvkernels.devices import cpu
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import ClusterError, ContextError
from dvkernels.replicas.step_lock import StepLock
from dvkernels.strategies.servers import server_loop, worker_loop
from dvkernels.strategies.servers.client import ServerClient
from dvkernels.strategies.servers.job_objects import ClientObjects
from dvkernels.strategies.servers.remote_copies import RemoteCopies
from dvkernels.strategies.servers.remote_states import RemoteStates
from dvkernels.strategies.servers.remote_table import RemoteTable
from dvkernels.strategies.servers.requests import Block
from dvkernels.user_errors import brief
from dvkernels.values.placement import Placement
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization

__all__: list[str] = []


@final
class JobProcesses:
    """Processes of a job, as this one sees them: rank 0 coordinates, the last ones serve.

    Parameters
    ----------
    resolver : ClusterResolver, optional
        Says which process this is; that of the launcher if not given.
    num_servers : int
    timeout_seconds : float

    Raises
    ------
    ClusterError
        There are too few processes, or they differ in ``num_servers``. Raised on all.
    """

    objects: ClientObjects
    states: RemoteStates

    def __init__(
        self, resolver: ClusterResolver | None, num_servers: int, timeout_seconds: float
    ) -> None:
        found = default_resolver() if resolver is None else resolver
        if not isinstance(found, ClusterResolver):
            raise TypeError(
                f"expected cluster_resolver to be a dv.cluster.ClusterResolver, got "
                f"{brief(resolver)}"
            )
        size = found.num_workers
        if size < 3:
            raise _too_few(size, num_servers)
        group: Any = communicators.between_workers(found, timeout_seconds)
        self._group = group
        self.rank, self.size = self._group.rank, size
        self.workers = range(1, size - num_servers)
        self.servers = range(size - num_servers, size)
        # By worker: whose turn it is to use the channel, and the iterators that it has begun.
        self.turns = {rank: StepLock() for rank in self.workers}
        self.iterators: dict[int, set[int]] = {rank: set() for rank in self.workers}
        self._pid = os.getpid()
        self._keys = itertools.count()
        try:
            counts = self._group.exchange(num_servers)
            if len({*counts}) > 1:
                raise ClusterError(f"num_servers must be the same in all processes; got {counts}")
            if num_servers < 1 or size < num_servers + 2:
                raise _too_few(size, num_servers)
            self._channels: list[MessageChannel | None] = group.channels()
        except BaseException:
            self._group.close()
            raise
        if cpu.usable_cores() <= len(self.workers):  # who polls keeps the awaited one from running
            for channel in filter(None, self._channels):
                channel.pace = wait.SHARED_CORE_MESSAGE
        others = [self.channel(rank) for rank in self.servers if rank != self.rank]
        self.client = ServerClient(others, timeout_seconds, is_interruptible=self.rank == 0)

    def channel(self, rank: int) -> MessageChannel:
        """Return the channel to another process."""
        channel = self._channels[rank]
        assert channel is not None
        return channel

    def connect(self, strategy: Any) -> None:
        """Let the variables of a strategy lie on the servers, which this process can ask."""
        self.objects = self.client.references = ClientObjects(self.rank, strategy, self.client)
        self.states = RemoteStates(
            self.client, lambda: self.objects.placement, is_in_call=self.rank != 0
        )

    def serve(self, frame: Frame, server_placement: Placement) -> None:
        """Serve, or run calls, until the coordinator leaves.

        An interrupt is the coordinator's: the terminal sends it to all processes.
        """
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
        try:
            if self.rank in self.servers:
                others = [self.channel(k) for k in range(self.size) if k not in self.servers]
                server_loop.serve(self.rank, others, server_placement)
            else:
                worker_loop.work(self.rank, self.channel(0), frame, self.objects)
        finally:
            if is_main:
                signal.signal(signal.SIGINT, before)

    def reports(self) -> dict[int, server_loop.ServerReport]:
        """Return what each server has done, by its rank."""
        request = ("report", server_loop.REPORT, None)
        answers = self.client.ask("stats", [(rank, request) for rank in self.servers])
        return dict(zip(self.servers, answers, strict=True))

    def close(self) -> None:
        """Leave the job; the others end when the coordinator does. In a fork do nothing."""
        if self._pid != os.getpid():
            return
        self.client.is_closed = True
        self._group.transport.leave("it has closed its strategy")
        self._group.close()

    # -- variables --------------------------------------------------------------------------------

    def make_copies(
        self,
        initial: HostArray,
        placement: Placement,
        name: str,
        synchronization: VariableSynchronization,
        aggregation: VariableAggregation,
    ) -> RemoteCopies:
        """Return the copies of a new variable, whose rows are sent to the servers."""
        if self.rank != 0:
            raise ContextError(
                f"variable {name!r} was created in a call, on a worker; create the variables of a "
                f"parameter-server strategy outside of its calls"
            )
        assert placement.deal_rows is not None
        shape, dtype = initial.shape, initial.dtype
        shards = placement.deal_rows(shape, dtype, name)
        key, blocks = next(self._keys), self._blocks_of(shards)
        # Those that fail are dropped by the servers with the next message.
        copies = RemoteCopies(
            RemoteTable(self.client, key, blocks), shape, dtype, placement, name, aggregation
        )
        self.client.name(key, name, blocks)
        loads = [initial.nbytes * (b.end - b.first) // max(1, shards[-1].stop) for b in blocks]
        for block, nbytes in zip(blocks, loads, strict=True):
            self.client.servers[block.server].nbytes += nbytes
        weakref.finalize(copies, self._drop, key, blocks, loads).atexit = False
        asked = [
            (
                block.server,
                (
                    "Variable",
                    server_loop.CREATE,
                    key,
                    name,
                    np.ascontiguousarray(initial[block.first : block.end]) if shape else initial,
                ),
            )
            for block in blocks
        ]
        self.client.ask(f"Variable {name!r}", asked)
        return copies

    def _drop(self, key: int, blocks: list[Block], loads: list[int]) -> None:
        self.client.drop(key)
        for block, nbytes in zip(blocks, loads, strict=True):
            self.client.servers[block.server].nbytes -= nbytes

    def _blocks_of(self, shards: Any) -> list[Block]:
        """Deal shards to the servers that have the fewest bytes; neighbours are one block."""
        by_load = sorted(self.servers, key=lambda rank: self.client.servers[rank].nbytes)
        chosen = by_load[: len(shards)]
        each, larger = divmod(len(shards), len(chosen))
        blocks, first = [], 0
        for k, rank in enumerate(chosen):
            end = first + each + (k < larger)
            blocks.append(Block(rank, shards[first].start, shards[end - 1].stop))
            first = end
        return blocks


def _too_few(size: int, num_servers: int) -> ClusterError:
    return ClusterError(
        f"ParameterServerStrategy over {size} processes with num_servers={num_servers}: "
        f"expected at least a coordinator, a worker and a server; leave out "
        f"cluster_resolver and num_servers for workers that are threads of one process"
    )
