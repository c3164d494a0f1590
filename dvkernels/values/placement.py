"""Placement of a strategy: its devices, its communicators, and the numbering of its replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.single import Single
from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.devices import array_memory as memory
from dvkernels.devices import jax_devices
from dvkernels.devices.device import Device
from dvkernels.replicas.step_lock import StepLock

__all__: list[str] = []


_ALONE = Single()


@dataclass(frozen=True, eq=False)
class Placement:
    """The part of a strategy that its variables and replica contexts need.

    Its identity says which strategy a value belongs to. Replica ids count over all workers; the
    local replicas, those of this process, have consecutive ids from ``first_replica`` on. A rank
    is a position among the local replicas. With a single worker all replicas are local.
    """

    replica_devices: tuple[Device, ...]  # of the local replicas
    communicator: Communicator
    name: str  # of the strategy, for messages
    central_device: Device | None = None  # of each variable's only copy; None: one copy a replica
    parent: Placement | None = None  # the strategy's placement, if this one describes a single copy
    workers: Workers = _ALONE
    replicas_of_workers: tuple[int, ...] | None = None  # None: a single worker
    background_communicator: Communicator | None = None  # of the progress thread; None: the same
    is_default: bool = False  # the default strategy: any strategy may read its variables
    step_lock: StepLock = field(default_factory=StepLock)
    all_devices: Any = None  # the mesh of JAX over all workers; None: those of this process
    # Of a strategy whose variables have servers: the rows of each shard of a variable, given its
    # shape, dtype and name.
    deal_rows: Callable[[tuple[int, ...], Any, str], Sequence[range]] | None = None
    # Of a strategy whose variables lie in other processes: makes the copies of a variable there.
    make_copies: Callable[..., Any] | None = None
    # And the states of optimizers, which lie there too: ``optimizers.optimizer_state``.
    optimizer_states: Any = None

    @cached_property
    def num_replicas(self) -> int:
        """The number of replicas in sync, over all workers."""
        return self.communicator.size

    @cached_property
    def num_local(self) -> int:
        """The number of replicas of this process."""
        return len(self.replica_devices)

    @cached_property
    def share(self) -> WorkerShare:
        """The replicas of this worker among those of all workers."""
        return WorkerShare(self.replicas_of_workers or (self.num_local,), self.workers.rank)

    @cached_property
    def first_replica(self) -> int:
        """The id of the first local replica."""
        return self.share.first_replica

    @property
    def async_communicator(self) -> Communicator:
        """The communicator of the progress thread, which reduces while the replicas go on."""
        background = self.background_communicator
        return self.communicator if background is None else background

    def broadcast_from_chief(self, array: Any) -> Any:
        """Return the array of the first worker; every worker must call this with its own array.

        With a single worker the array itself is returned, not copied.
        """
        return array if self.workers.size == 1 else self.workers.broadcast([array], 0)[0]

    @property
    def copy_devices(self) -> tuple[Device, ...]:
        """The devices that hold the copies of a variable."""
        return self.replica_devices if self.central_device is None else (self.central_device,)

    @cached_property
    def memory(self) -> memory.ArrayMemory:
        """The memory that holds the arrays of these devices."""
        return memory.of([*self.replica_devices, *self.copy_devices])

    @cached_property
    def mesh(self) -> Any:
        """The mesh of JAX of all replicas, over all workers."""
        if self.all_devices is not None:
            return self.all_devices
        return jax_devices.mesh(self.replica_devices)

    @cached_property
    def jax_local_devices(self) -> list[Any]:
        """The devices of JAX of the local replicas."""
        return [*map(jax_devices.own, self.replica_devices)]

    def is_of(self, strategy: Placement) -> bool:
        """Return whether this is a strategy's placement, or that of one of its copies."""
        return self is strategy or self.parent is strategy
