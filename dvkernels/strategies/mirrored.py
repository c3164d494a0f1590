"""Several replicas in one process, variables mirrored on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from dvkernels.communicators import registry as communicators
from dvkernels.communicators.base import Communicator
from dvkernels.devices import registry
from dvkernels.devices.base import Device
from dvkernels.strategies.base import Strategy

__all__ = ["MirroredStrategy"]


@final
class MirroredStrategy(Strategy):
    """One replica per device of this process, variables mirrored on all of them.

    Parameters
    ----------
    devices : sequence of Device or str, optional
        One replica per usable core if not given.
    cross_device_ops : str or Communicator
        ``"auto"`` (chosen by size), ``"direct"``, ``"ring"``, or an object of the protocol.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    ...     ids = strategy.run(lambda: dv.get_replica_context().replica_id_in_sync_group)
    ...     print(ids, strategy.reduce("sum", ids))
    PerReplica(0: 0, 1: 1) 1
    """

    def __init__(
        self,
        devices: Sequence[Device | str] | None = None,
        *,
        cross_device_ops: str | Communicator = "auto",
    ) -> None:
        resolved = registry.resolve_all(devices)
        communicator = communicators.between_devices(len(resolved), cross_device_ops)
        super().__init__(resolved, communicator)
