"""Parameter-server strategy: tables that many workers read and change, each at its own pace."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, final

import numpy as np

from dvkernels.devices import cpu
from dvkernels.errors import ClusterError, DeviceError
from dvkernels.philox import StrategyGenerators
from dvkernels.replicas.runner import Runner
from dvkernels.strategies import partitioners
from dvkernels.strategies.base import Strategy
from dvkernels.user_errors import brief
from dvkernels.values.scalar_checks import is_integer

__all__ = ["ParameterServerStrategy"]

# In a call of a coordinator: the index of the worker, and the number of the call.
current_call: ContextVar[tuple[int, int] | None] = ContextVar("dvkernels_call", default=None)


class _CallGenerators(StrategyGenerators):
    """Random generators keyed by the number of the call, and not by the worker that makes it."""

    __slots__ = ()

    def of_replica(self, rank: int, replica_id: int, name: str) -> np.random.Generator:
        """Return the generator of the call under way; outside of calls, of the step."""
        call = current_call.get()
        if call is None:
            return super().of_replica(rank, replica_id, name)
        return self.of_item(*call, name)


@final
class ParameterServerStrategy(Strategy):
    """Workers that make calls, each at its own pace, and variables that a server changes for them.

    A :class:`ClusterCoordinator` hands calls out to the workers, which are threads. There is one
    copy of each variable. No worker waits for another: a variable is read and written by one call
    at a time, and between a read and a write others may write. Where a step may wait for all
    replicas, which is nearly always, use :class:`MirroredStrategy`.

    Parameters
    ----------
    cluster_resolver : None
        For servers and workers in other processes, which do not exist yet.
    num_servers : int
        0: the variables lie in this process.
    variable_partitioner : callable, optional
        One of ``dv.partitioners``, or a function of shape and dtype: into how many shards the rows
        of a variable are dealt. A single shard if not given.
    num_workers : int, optional
        The number of worker threads; one per usable core if not given.
    seed : int
        Seed of ``ctx.rng``, from 0 to 2**1024 - 1. In a call of a coordinator its draws depend on
        seed, name and number of the call.
    threads : str
        ``"share"`` or ``"all"``: the threads of BLAS, OpenMP and Numba in each worker, as for
        :class:`Strategy`.
    timeout_seconds : float
        How long ``join`` and the others wait while no call ends [s]. The default gives way to the
        environment variable ``DVKERNELS_TIMEOUT_SECONDS``.

    Raises
    ------
    ClusterError
        Servers in other processes are asked for.
    DeviceError
        ``num_workers`` is not a positive integer.
    ValueError, TypeError
        As for :class:`Strategy`.

    Notes
    -----
    Variables are ON_WRITE, and writes need no aggregation, in calls too. ``read_value`` returns a
    copy. ``run`` calls ``fn`` as the only replica, on the thread of the worker that makes the call,
    or outside of calls on the caller's.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.ParameterServerStrategy(num_workers=2) as strategy:
    ...     with strategy.scope():
    ...         seen = dv.Variable([0, 0, 0])
    ...     coordinator = dv.ClusterCoordinator(strategy)
    ...     for word in [0, 2, 2]:
    ...         result = coordinator.schedule(seen.scatter_add, ([word], [1]))
    ...     coordinator.join()
    ...     print(seen.numpy())
    [1 0 2]
    """

    def __init__(
        self,
        cluster_resolver: Any = None,
        *,
        num_servers: int = 0,
        variable_partitioner: partitioners.Partitioner | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        threads: str = "share",
        timeout_seconds: float = 600,
    ) -> None:
        if not is_integer(num_servers) or num_servers < 0:
            raise ClusterError(f"num_servers is 0 or a positive integer; got {brief(num_servers)}")
        if cluster_resolver is not None or num_servers:
            raise ClusterError(
                "ParameterServerStrategy has no servers and workers in other processes yet: leave "
                "out cluster_resolver and num_servers, and the workers are threads of this process"
            )
        if variable_partitioner is not None and not callable(variable_partitioner):
            raise ClusterError(
                f"variable_partitioner is one of dv.partitioners, or a function of shape and "
                f"dtype; got {brief(variable_partitioner)}"
            )
        count = cpu.usable_cores() if num_workers is None else num_workers
        if not is_integer(count) or count < 1:
            raise DeviceError(f"num_workers is a positive integer; got {brief(count)}")
        super().__init__(
            ["cpu:0"],
            central_device="cpu:0",
            seed=seed,
            threads=threads,
            timeout_seconds=timeout_seconds,
        )
        self._placement = dataclasses.replace(
            self._placement,
            name=f"ParameterServerStrategy({count} workers)",
            deal_rows=functools.partial(partitioners.deal, variable_partitioner),
        )
        self.generators = _CallGenerators(seed, count)
        self.num_workers = count
        self.shares_threads = threads == "share" and count > 1
        self.timeout_seconds = float(timeout_seconds)
        # Calls run steps as in merge_call: within a step of this strategy, without its lock.
        self._runner = Runner(
            1,
            self._placement.name,
            step_lock=self._placement.step_lock,
            generators=self.generators,
            timeout_seconds=self.timeout_seconds,
        )
        self.coordinator: Callable[[], Any] = _no_coordinator

    def adopt(self, coordinator: Any) -> None:
        """Keep a weak reference to a coordinator, to close it with the strategy."""
        self.coordinator = weakref.ref(coordinator)

    def close(self) -> None:
        """End the workers, and the coordinator with them. Variables stay readable."""
        coordinator = self.coordinator()
        if coordinator is not None:
            coordinator.close()
        super().close()


def _no_coordinator() -> None:
    """Stand for a coordinator that does not exist."""
