"""TPU strategy: replicas on devices of JAX, eagerly or as one compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from dvkernels.communicators import registry as communicators
from dvkernels.devices import registry
from dvkernels.devices.device import Device
from dvkernels.errors import DeviceError
from dvkernels.strategies.base import Strategy
from dvkernels.strategies.strategy_options import check_options

__all__ = ["TPUStrategy"]


@final
class TPUStrategy(Strategy):
    """One replica per device of JAX, in all processes of a job, variables mirrored on all of them.

    Parameters
    ----------
    devices : sequence of Device or str, optional
        Those of this process: of JAX, ``"jax:tpu:0"`` or ``"jax:cpu:0"``, each named once. All its
        TPUs if not given. ``XLA_FLAGS=--xla_force_host_platform_device_count=8``, set before JAX
        is imported, makes 8 CPU devices.
    seed : int
        Seed of ``ctx.rng`` and ``ctx.rng_key``, from 0 to 2**1024 - 1.
    timeout_seconds : float
        How long a process, or a replica, waits for the others in a collective [s]. The default
        gives way to the environment variable ``DVKERNELS_TIMEOUT_SECONDS``, between replicas.
        Inside a compiled step XLA waits, by limits of its own.

    Raises
    ------
    DeviceError
        JAX is not installed, has no TPU, or a device is not one of JAX.
    CollectiveTimeoutError
        Another process of ``jax.distributed`` did not create its strategy in time.
    ValueError, TypeError
        ``seed`` or ``timeout_seconds`` has none of the right values.

    Notes
    -----
    ``run`` of a function calls it once per replica: for porting, tests and debugging. Functions
    that JAX compiles inside are compiled for each device anew. For speed, compile the step:
    ``strategy.run(strategy.jit(step), args)``.

    Where ``jax.distributed`` has joined several processes, all of them create this strategy at the
    same point of the program, and its notes are those of :class:`MultiWorkerMirroredStrategy`. A
    process that is lost is ``WorkerLostError`` in the others, and the job must be started again.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.TPUStrategy(["jax:cpu:0"]) as strategy:
    ...     with strategy.scope():
    ...         total = dv.Variable(0.0, aggregation="sum")
    ...     step = strategy.jit(lambda x: total.assign_add(x))
    ...     strategy.run(step, args=(2.5,))
    ...     print(float(total))
    2.5
    """

    def __init__(
        self,
        devices: Sequence[Device | str] | None = None,
        *,
        seed: int = 0,
        timeout_seconds: float = 600,
    ) -> None:
        found = registry.list_devices("jax:tpu") if devices is None else devices
        resolved = registry.resolve_all(found)
        for device in resolved:
            if not device.kind.startswith("jax:"):
                raise DeviceError(
                    f"TPUStrategy expected devices of JAX such as 'jax:tpu:0' or 'jax:cpu:0', got "
                    f"'{device}'; use MirroredStrategy for those of NumPy and CUDA"
                )
        check_options(
            bytes_per_bucket=None, seed=seed, threads="all", timeout_seconds=timeout_seconds
        )
        workers = communicators.between_jax_processes(float(timeout_seconds))
        try:
            super().__init__(
                resolved,
                workers=workers,
                seed=seed,
                threads="all",
                timeout_seconds=timeout_seconds,
            )
        except BaseException:
            workers.close()  # nobody else would
            raise
