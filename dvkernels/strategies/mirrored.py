"""Several replicas in one process, variables mirrored on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from dvkernels.communicators.base import Communicator
from dvkernels.devices.base import Device
from dvkernels.strategies.base import Strategy

__all__ = ["MirroredStrategy"]


@final
class MirroredStrategy(Strategy):
    """One replica per device of this process, variables mirrored on all of them.

    Parameters
    ----------
    devices : sequence of Device or str, optional
        One replica each; a CPU device or a GPU may be named several times. All GPUs if not given,
        or else one replica per usable core; under a launcher, per core of its share.
    cross_device_ops : str or Communicator
        ``"auto"`` (chosen by size), ``"direct"``, ``"ring"``, ``"nccl"`` (NVIDIA's library, between
        GPUs of which each has one replica), or an object of the protocol.
    bytes_per_bucket : int, optional
        Pack the arrays of a nest into buckets of so many bytes for ``all_reduce``. Not packed if
        not given, which is faster over the kernels of one process.

    Raises
    ------
    DeviceError, AlgorithmError
        Devices or a communicator that do not exist or do not fit.
    ValueError
        ``bytes_per_bucket`` is not a positive integer.

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
        bytes_per_bucket: int | None = None,
    ) -> None:
        super().__init__(devices, cross_device_ops, bytes_per_bucket=bytes_per_bucket)
