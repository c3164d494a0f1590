"""Where the copies of a strategy's values live, and who brings them together."""

from __future__ import annotations

from dataclasses import dataclass

from dvkernels.communicators.base import Communicator
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

    @property
    def num_replicas(self) -> int:
        """The number of replicas in sync."""
        return len(self.replica_devices)
