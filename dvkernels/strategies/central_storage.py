"""Several replicas in one process, and a single copy of every variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from dvkernels.devices import registry
from dvkernels.devices.base import Device
from dvkernels.strategies.base import Strategy

__all__ = ["CentralStorageStrategy"]


@final
class CentralStorageStrategy(Strategy):
    """One replica per device, and one copy of each variable that all of them read.

    Writes in a replica go through the variable's aggregation, as under ``MirroredStrategy``. It
    takes a replica's share of the memory for variables; variables are ON_WRITE, since ON_READ and
    NONE would need a copy per replica and raise ``SynchronizationError``.

    Parameters
    ----------
    compute_devices : sequence of Device or str, optional
        One replica each. All GPUs if not given, or else one replica per usable core.
    parameter_device : Device or str, optional
        Where variables live, of the kind of the others; ``"cpu:0"`` if not given, or the first
        of the GPUs.

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
        compute_devices: Sequence[Device | str] | None = None,
        parameter_device: Device | str | None = None,
    ) -> None:
        devices = registry.resolve_all(compute_devices)
        if parameter_device is None:
            parameter_device = "cpu:0" if devices[0].kind == "cpu" else devices[0]
        super().__init__(devices, central_device=parameter_device)
