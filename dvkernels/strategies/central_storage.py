"""Central storage strategy: several replicas in one process, one copy of every variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from dvkernels.devices import registry
from dvkernels.devices.device import Device
from dvkernels.strategies.base import Strategy

__all__ = ["CentralStorageStrategy"]


@final
class CentralStorageStrategy(Strategy):
    """One replica per device, and one copy of each variable that all of them read.

    Writes in replica context are aggregated, as under ``MirroredStrategy``. With N replicas, the
    variables take 1/N of the memory that mirrored ones take.

    Parameters
    ----------
    compute_devices : sequence of Device or str, or int, optional
        One replica each; a number means so many CPU replicas. If not given, all GPUs, or one
        replica per usable core where there is no GPU.
    parameter_device : Device or str, optional
        The device that holds the variables, of the same kind as ``compute_devices``. If not given,
        ``"cpu:0"``, or the first of the GPUs.
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
        A device does not exist, the list is empty, the devices differ in kind, or the number is
        not positive.
    ValueError
        ``seed``, ``threads`` or ``timeout_seconds`` has none of the right values.
    TypeError
        ``seed`` is not an integer.

    Notes
    -----
    Variables are ON_WRITE: creating one with ON_READ or NONE, which need a copy per replica, raises
    ``SynchronizationError``.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.CentralStorageStrategy(["cpu:0", "cpu:1"]) as strategy:
    ...     with strategy.scope():
    ...         total = dv.Variable(0.0, aggregation="sum")
    ...     strategy.run(lambda: total.assign_add(1.0))
    ...     print(float(total), len(total.values))
    2.0 1
    """

    def __init__(
        self,
        compute_devices: Sequence[Device | str] | int | None = None,
        parameter_device: Device | str | None = None,
        *,
        seed: int = 0,
        threads: str = "share",
        timeout_seconds: float = 600,
    ) -> None:
        devices = registry.resolve_all(compute_devices)
        if parameter_device is None:
            parameter_device = "cpu:0" if devices[0].kind == "cpu" else devices[0]
        super().__init__(
            devices,
            central_device=parameter_device,
            seed=seed,
            threads=threads,
            timeout_seconds=timeout_seconds,
        )
