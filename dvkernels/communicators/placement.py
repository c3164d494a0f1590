"""Where the copies of a strategy's values live, and who brings them together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dvkernels.communicators.base import Communicator
from dvkernels.devices import memory
from dvkernels.devices.base import Device

__all__: list[str] = []


@dataclass(frozen=True, eq=False)
class Placement:
    """What a variable, or a replica's context, needs to know of its strategy.

    Its identity says which strategy a value belongs to.
    """

    replica_devices: tuple[Device, ...]
    communicator: Communicator
    name: str  # of the strategy, for messages
    central_device: Device | None = None  # of the only copy of each variable; None: one a replica
    whole: Placement | None = None  # of the strategy, where this one describes a single copy

    @property
    def num_replicas(self) -> int:
        """The number of replicas in sync."""
        return len(self.replica_devices)

    @property
    def copy_devices(self) -> tuple[Device, ...]:
        """Where the copies of a variable live."""
        return self.replica_devices if self.central_device is None else (self.central_device,)

    @cached_property
    def memory(self) -> memory.Memory:
        """What its arrays lie in."""
        return memory.of([*self.replica_devices, *self.copy_devices])

    def is_of(self, strategy: Placement) -> bool:
        """Return whether this is a strategy's placement, or that of one of its copies."""
        return self is strategy or self.whole is strategy
