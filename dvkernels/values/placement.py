"""Where the copies of a strategy's values live, and who brings them together."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.single import Single
from dvkernels.devices import array_memory as memory
from dvkernels.devices.base import Device
from dvkernels.replicas.step_lock import StepLock
from dvkernels.schedules import partition

__all__: list[str] = []


_ALONE = Single()


@dataclass(frozen=True, eq=False)
class Placement:
    """What a variable, or a replica's context, needs to know of its strategy.

    Its identity says which strategy a value belongs to. Replicas are numbered over all workers;
    those of this process, the local ones, follow each other from ``first_replica`` on. A rank is
    a position among the local ones. One worker alone has them all.
    """

    replica_devices: tuple[Device, ...]  # of the local replicas
    communicator: Communicator
    name: str  # of the strategy, for messages
    central_device: Device | None = None  # of the only copy of each variable; None: one a replica
    whole: Placement | None = None  # of the strategy, where this one describes a single copy
    workers: Workers = _ALONE
    replicas_of_workers: tuple[int, ...] | None = None  # None: all are of this one
    background: Communicator | None = None  # for a thread that reduces meanwhile; None: the same
    is_default: bool = False  # of what applies outside every scope: its variables go anywhere
    turn: StepLock = field(default_factory=StepLock)

    @property
    def num_replicas(self) -> int:
        """The number of replicas in sync, over all workers."""
        return self.communicator.size

    @property
    def num_local(self) -> int:
        """The number of replicas of this process."""
        return len(self.replica_devices)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many replicas each worker has."""
        return self.replicas_of_workers or (self.num_local,)

    @cached_property
    def _starts(self) -> list[int]:
        return partition.starts(self.counts)

    @cached_property
    def first_replica(self) -> int:
        """The id of the first local replica."""
        return self._starts[self.workers.rank]

    @property
    def beside(self) -> Communicator:
        """The communicator of a thread that reduces while replicas go on."""
        return self.communicator if self.background is None else self.background

    def worker_of(self, replica: int) -> int:
        """Return the worker that a replica belongs to."""
        return bisect.bisect(self._starts, replica) - 1

    def of_chief(self, array: Any) -> Any:
        """Return the array that the first worker holds; every worker calls this with its own.

        The array itself, not copied, where there is one worker.
        """
        return array if len(self.counts) == 1 else self.workers.broadcast([array], 0)[0]

    @property
    def copy_devices(self) -> tuple[Device, ...]:
        """Where the copies of a variable live."""
        return self.replica_devices if self.central_device is None else (self.central_device,)

    @cached_property
    def memory(self) -> memory.ArrayMemory:
        """What its arrays lie in."""
        return memory.of([*self.replica_devices, *self.copy_devices])

    def is_of(self, strategy: Placement) -> bool:
        """Return whether this is a strategy's placement, or that of one of its copies."""
        return self is strategy or self.whole is strategy
