"""One-device strategy, and the default strategy outside every scope."""

from __future__ import annotations

from typing import final

from dvkernels import context
from dvkernels.communicators.single import Single
from dvkernels.devices import registry
from dvkernels.devices.device import Device
from dvkernels.strategies.base import Strategy

__all__ = ["OneDeviceStrategy"]


@final
class OneDeviceStrategy(Strategy):
    """One replica on one device, for running a distributed program on a single device.

    Parameters
    ----------
    device : Device or str
        The device of the replica and of the variables.
    seed : int
        Seed of ``ctx.rng``, from 0 to 2**1024 - 1.
    threads : str
        ``"share"`` or ``"all"``, as for other strategies. A single replica has all threads anyway.
    timeout_seconds : float
        How long a step waits for the one before it [s]. The default gives way to the environment
        variable ``DVKERNELS_TIMEOUT_SECONDS``.

    Raises
    ------
    DeviceError
        The device does not exist.
    ValueError
        ``seed``, ``threads`` or ``timeout_seconds`` has none of the right values.
    TypeError
        ``seed`` is not an integer.

    Examples
    --------
    >>> import dvkernels as dv
    >>> strategy = dv.OneDeviceStrategy("cpu:0")
    >>> strategy.run(lambda: dv.get_replica_context().num_replicas_in_sync)
    PerReplica(0: 1)
    """

    def __init__(
        self,
        device: Device | str,
        *,
        seed: int = 0,
        threads: str = "share",
        timeout_seconds: float = 600,
    ) -> None:
        super().__init__(
            (registry.resolve(device),),
            Single(),
            seed=seed,
            threads=threads,
            timeout_seconds=timeout_seconds,
        )


@final
class DefaultStrategy(Strategy):
    """Strategy outside every scope: one replica; owner of the variables created there."""

    def __init__(self) -> None:
        super().__init__(context.UNSCOPED.replica_devices, context.UNSCOPED.communicator)
        self._placement = context.UNSCOPED


context.install_default(DefaultStrategy)
