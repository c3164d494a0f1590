"""Mirrored strategy: several replicas in one process, variables mirrored on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from dvkernels.communicators.base import Communicator
from dvkernels.devices.device import Device
from dvkernels.strategies.base import Strategy

__all__ = ["MirroredStrategy"]


@final
class MirroredStrategy(Strategy):
    """One replica per device of this process, variables mirrored on all of them.

    Parameters
    ----------
    devices : sequence of Device or str, or int, optional
        One replica each; a device may be named several times. A number means so many CPU replicas.
        If not given, all GPUs, or one replica per usable core where there is no GPU (under a
        launcher, per core of this process's share).
    cross_device_ops : str or Communicator
        The algorithm of the collectives: ``"auto"`` (chosen by size), ``"direct"``, ``"ring"``,
        ``"nccl"`` (NVIDIA's library, for GPUs with one replica each), or an object that
        implements ``dv.Communicator``.
    bytes_per_bucket : int, optional
        Size of the buckets into which ``all_reduce`` packs the arrays of a pytree [bytes]. If not
        given, arrays are not packed, which is faster with the kernels of one process.
    seed : int
        Seed of ``ctx.rng``, from 0 to 2**1024 - 1.
    threads : str
        ``"share"`` or ``"all"``: the threads of BLAS, OpenMP and Numba in each replica, as for
        :class:`Strategy`.
    timeout_seconds : float
        How long a replica waits for the others in a collective [s]. The default gives way to the
        environment variable ``DVKERNELS_TIMEOUT_SECONDS``.

    Raises
    ------
    DeviceError
        A device does not exist, the list is empty or mixes CPU devices and GPUs, or the number is
        not positive.
    AlgorithmError
        There is no such algorithm, or it does not support these devices.
    ValueError
        ``bytes_per_bucket``, ``seed``, ``threads`` or ``timeout_seconds`` has none of the right
        values.
    TypeError
        ``seed`` is not an integer.

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
        devices: Sequence[Device | str] | int | None = None,
        *,
        cross_device_ops: str | Communicator = "auto",
        bytes_per_bucket: int | None = None,
        seed: int = 0,
        threads: str = "share",
        timeout_seconds: float = 600,
    ) -> None:
        super().__init__(
            devices,
            cross_device_ops,
            bytes_per_bucket=bytes_per_bucket,
            seed=seed,
            threads=threads,
            timeout_seconds=timeout_seconds,
        )
