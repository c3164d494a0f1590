"""Parameter-server strategy: tables that many workers read and change, each at its own pace."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, final

from dvkernels.context import Frame
from dvkernels.devices import cpu
from dvkernels.errors import ClusterError, DeviceError
from dvkernels.replicas.runner import Runner
from dvkernels.strategies import partitioners
from dvkernels.strategies.base import Strategy
from dvkernels.strategies.current_call import CallGenerators
from dvkernels.strategies.servers.processes import JobProcesses
from dvkernels.strategies.strategy_options import check_options
from dvkernels.user_errors import brief
from dvkernels.values.scalar_checks import is_integer

__all__ = ["ParameterServerStrategy"]


@final
class ParameterServerStrategy(Strategy):
    """Workers that make calls, each at its own pace, and variables that a server changes for them.

    A :class:`ClusterCoordinator` hands calls out to the workers: threads, or other processes. There
    is one copy of each variable. No worker waits for another: a variable is read and written by one
    call at a time, and between a read and a write others may write. Where a step may wait for all
    replicas, which is nearly always, use :class:`MirroredStrategy`.

    Parameters
    ----------
    cluster_resolver : ClusterResolver, optional
        Says which process of a job this is, if ``num_servers`` is positive. That of the launcher if
        not given.
    num_servers : int
        0: the variables lie in this process, and the workers are its threads. Else the job has
        several processes, all of which make this strategy: rank 0 is the coordinator, the last
        ``num_servers`` have the rows of the variables, and the others are the workers. On all but
        rank 0 the constructor serves, or runs calls, until the coordinator leaves, and ends the
        process with exit code 0.
    variable_partitioner : callable, optional
        One of ``dv.partitioners``, or a function of shape and dtype: into how many shards the rows
        of a variable are dealt. A single shard if not given.
    num_workers : int, optional
        The number of worker threads; one per usable core if not given. Not with ``num_servers``.
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
        There are too few processes, or they differ in ``num_servers``.
    CollectiveTimeoutError
        A process did not make its strategy in time.
    WorkerLostError
        The coordinator of this process has been lost.
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
        if variable_partitioner is not None and not callable(variable_partitioner):
            raise ClusterError(
                f"variable_partitioner is one of dv.partitioners, or a function of shape and "
                f"dtype; got {brief(variable_partitioner)}"
            )
        count = cpu.usable_cores() if num_workers is None else num_workers
        if not is_integer(count) or count < 1:
            raise DeviceError(f"num_workers is a positive integer; got {brief(count)}")
        self.processes: JobProcesses | None = None
        if cluster_resolver is not None or num_servers:
            check_options(
                bytes_per_bucket=None, seed=seed, threads=threads, timeout_seconds=timeout_seconds
            )
            if num_workers is not None:
                raise ClusterError(
                    "num_workers is for threads of one process; with servers in other processes "
                    "the workers are the processes that do not serve"
                )
            self.processes = JobProcesses(cluster_resolver, num_servers, float(timeout_seconds))
            count = len(self.processes.workers)
        try:
            self._finish(count, variable_partitioner, seed, threads, timeout_seconds)
        except BaseException:
            if self.processes is not None:
                self.processes.close()
            raise
        if self.processes is not None and self.processes.rank != 0:
            self._serve()

    def _finish(
        self,
        count: int,
        variable_partitioner: partitioners.Partitioner | None,
        seed: int,
        threads: str,
        timeout_seconds: float,
    ) -> None:
        processes = self.processes
        super().__init__(
            ["cpu:0"],
            central_device="cpu:0",
            seed=seed,
            threads=threads,
            timeout_seconds=timeout_seconds,
        )
        self._server_placement = self._placement
        described = f"{count} workers"
        if processes is not None:
            described = f"{described}, {len(processes.servers)} servers"
            processes.connect(self)
        self._placement = dataclasses.replace(
            self._placement,
            name=f"ParameterServerStrategy({described})",
            deal_rows=functools.partial(partitioners.deal, variable_partitioner),
            make_copies=None if processes is None else processes.make_copies,
            optimizer_states=None if processes is None else processes.states,
        )
        self.generators = CallGenerators(seed, count)
        self.num_workers = count
        self.shares_threads = threads == "share" and count > 1 and processes is None
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

    def _serve(self) -> NoReturn:
        """Serve or run calls until the coordinator leaves; then end this process."""
        assert self.processes is not None
        try:
            frame = Frame(self._placement, self, merging=True)
            self.processes.serve(frame, self._server_placement)
        finally:
            self.close()
        raise SystemExit(0)

    def adopt(self, coordinator: Any) -> None:
        """Keep a weak reference to a coordinator, to close it with the strategy."""
        self.coordinator = weakref.ref(coordinator)

    def close(self) -> None:
        """End the workers, and the coordinator with them.

        Variables stay readable, unless they lie on servers in other processes, which end.
        """
        coordinator = self.coordinator()
        try:
            if coordinator is not None:
                coordinator.close()
        finally:  # also if a call does not end
            super().close()
            if self.processes is not None:
                self.processes.close()


def _no_coordinator() -> None:
    """Stand for a coordinator that does not exist."""
