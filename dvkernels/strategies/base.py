"""The strategy: devices, a communicator, and a placement of variables on the devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, Self

from dvkernels import context, html_table, tracebacks
from dvkernels.communicators import registry as communicators
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.single import Single
from dvkernels.context import Frame
from dvkernels.data.distributed.dataset import EpochCounts
from dvkernels.devices import array_memory, jax_devices, registry
from dvkernels.devices.device import Device
from dvkernels.devices.jax_devices import DefaultDevices
from dvkernels.devices.replica_streams import StreamOrder
from dvkernels.errors import DeviceError
from dvkernels.philox import StrategyGenerators
from dvkernels.profiler import debugging
from dvkernels.replica_context import ReplicaContext
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.replicas.runner import Runner
from dvkernels.replicas.streams import StreamedRunner
from dvkernels.replicas.thread_limits import ThreadLimit
from dvkernels.strategies.compiled_step import CompiledStep, JitSteps, TraceCounter
from dvkernels.strategies.cross_replica import CrossReplica
from dvkernels.strategies.dataset_distribution import DatasetDistribution
from dvkernels.strategies.item_map import ItemMap
from dvkernels.strategies.per_replica_values import PerReplicaValues
from dvkernels.strategies.scope import Scope
from dvkernels.strategies.seeded_steps import SeededSteps
from dvkernels.strategies.strategy_options import check_options
from dvkernels.strategies.update import VariableUpdate
from dvkernels.values import function_checks, operands, regroup
from dvkernels.values.placement import Placement
from dvkernels.variables import drift
from dvkernels.variables.variable import variables_of

__all__ = ["Strategy"]


class Strategy(
    CrossReplica,
    PerReplicaValues,
    VariableUpdate,
    DatasetDistribution,
    ItemMap,
    SeededSteps,
    JitSteps,
):
    """Distribution of a computation over replicas: devices, a communicator, a home for variables.

    Use one of the final subclasses, or call this constructor for a strategy of your own.

    Parameters
    ----------
    devices : sequence of Device or str, or int, optional
        One per replica, all of one kind; a device may be named several times. Or so many CPU
        replicas. If not given, all GPUs, or one per usable core where there is no GPU.
    communicator : Communicator or str
        A communicator with one rank per device, or a name that ``MirroredStrategy`` accepts.
    bytes_per_bucket : int, optional
        Size of the buckets into which ``all_reduce`` packs the arrays of a pytree [bytes]. Not
        packed if not given.
    central_device : Device or str, optional
        Keep a single copy of each variable there, instead of one per replica.
    workers : Workers, optional
        The group of worker processes, each with replicas of its own; ``devices`` and
        ``communicator`` describe this process only. A single process if not given.
    seed : int
        Seed of ``ctx.rng``, from 0 to 2**1024 - 1.
    threads : str
        ``"share"``: from the first step of several CPU replicas until the strategy is closed, BLAS,
        OpenMP and Numba use at most cores // replicas threads in each of them. ``"all"``: they use
        as many as they are set to.
    timeout_seconds : float
        How long a replica waits for the others, or a step for the one before it [s]. The default
        gives way to the environment variable ``DVKERNELS_TIMEOUT_SECONDS``.

    Raises
    ------
    DeviceError
        A device does not exist, the list is empty or mixes CPU devices and GPUs, or the number is
        not positive.
    AlgorithmError
        The communicator has another size, or the object lacks methods of the protocol.
    ValueError
        ``bytes_per_bucket`` is not a positive integer, ``seed`` is out of range, ``threads`` is
        neither ``"share"`` nor ``"all"``, or ``timeout_seconds`` is not a positive number.
    TypeError
        ``seed`` is not an integer.

    Notes
    -----
    A strategy is a context manager that closes itself. The replica threads start at the first
    ``run`` and end with the strategy: by ``close()``, at the end of ``with``, or when the strategy
    is garbage-collected.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.Strategy(["cpu:0", "cpu:1"], "ring") as strategy:
    ...     ids = strategy.run(lambda: dv.get_replica_context().replica_id_in_sync_group)
    ...     print(strategy.reduce("sum", ids))
    1
    """

    _bound_by = (
        "its threads belong to this process, and its variables to this strategy; make another "
        "strategy where one is needed, and pass on the contents of variables with dv.Checkpoint, "
        "or as arrays (v.numpy())"
    )

    def __init__(
        self,
        devices: Sequence[Device | str] | int | None,
        communicator: Communicator | str = "auto",
        *,
        bytes_per_bucket: int | None = None,
        central_device: Device | str | None = None,
        workers: Workers | None = None,
        seed: int = 0,
        threads: str = "share",
        timeout_seconds: float = 600,
    ) -> None:
        check_options(
            bytes_per_bucket=bytes_per_bucket,
            seed=seed,
            threads=threads,
            timeout_seconds=timeout_seconds,
        )
        resolved = registry.resolve_all(devices)
        self.generators = StrategyGenerators(seed, len(resolved))
        central = None if central_device is None else registry.resolve(central_device)
        workers = Single() if workers is None else workers
        memory = array_memory.of(resolved)
        if central is not None and memory.is_immutable:
            raise DeviceError(
                f"{type(self).__name__} keeps a single copy of each variable, and strategies over "
                f"JAX have one for each device: use dv.TPUStrategy"
            )
        self._traces = TraceCounter()
        mesh = None
        if memory.is_immutable:
            mesh = jax_devices.mesh(resolved, workers.exchange)
        else:
            workers = communicators.for_any_memory(workers, memory is not array_memory.HOST)
        counts, between_all, background = communicators.between_all(
            resolved, communicator, workers, bytes_per_bucket, mesh
        )
        name = f"{type(self).__name__}({', '.join(str(device) for device in resolved)})"
        if workers.size > 1:
            name += f" on worker {workers.rank} of {workers.size}"
        self._epochs = EpochCounts()
        self._placement = Placement(
            resolved,
            between_all,
            name,
            central,
            workers=workers,
            replicas_of_workers=tuple(counts),
            background_communicator=background,
            all_devices=mesh,
        )
        announce = workers.announce if workers.size > 1 else None
        on_host = self._placement.memory is array_memory.HOST
        is_limited = threads == "share" and on_host and len(resolved) > 1
        self._runner: Runner | StreamedRunner = Runner(
            len(resolved),
            name,
            self._placement.first_replica,
            announce,
            self._placement.step_lock,
            self.generators,
            float(timeout_seconds),
            ThreadLimit(len(resolved)) if is_limited else None,
            communicators.algorithm_namer(between_all) if on_host else None,
        )
        if memory is array_memory.HOST:
            return
        order: StreamOrder | DefaultDevices
        if memory.is_immutable:
            order = DefaultDevices(resolved)
        else:
            order = StreamOrder([device.index for device in resolved])
        self._runner = StreamedRunner(self._runner, order)

    @property
    def num_replicas_in_sync(self) -> int:
        """The number of replicas over all workers; a global batch is split over them."""
        return self._placement.num_replicas

    @property
    def worker_devices(self) -> tuple[Device, ...]:
        """The devices of this process's replicas, in replica order."""
        return self._placement.replica_devices

    @property
    def parameter_devices(self) -> tuple[Device, ...]:
        """The devices that hold the copies of a variable."""
        return self._placement.copy_devices

    @property
    def cluster_resolver(self) -> Any:
        """The resolver of this process's position in the cluster; None for a single process."""
        return None

    def __repr__(self) -> str:
        return f"<{self._placement.name}>"

    _repr_html_ = html_table.of_attributes(name="_placement.name", devices="worker_devices")

    def close(self) -> None:
        """End the replica threads; leave a host group. Variables stay readable, ``run`` raises."""
        self._runner.close()
        self._placement.workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scope(self) -> Scope[Self]:
        """Return a context manager that makes this the current strategy.

        Returns
        -------
        context manager
            Yields the strategy. Variables created inside get one copy per replica. It may be
            entered again inside itself; entering it inside another strategy's scope, or in
            replica context, raises ``ContextError``. An interrupt before the first line of its
            ``__exit__`` leaves it current, as with any context manager of Python; its ``__exit__``
            can be called again.

        Examples
        --------
        >>> import dvkernels as dv
        >>> strategy = dv.MirroredStrategy(["cpu:0", "cpu:1"])
        >>> with strategy.scope():
        ...     step = dv.Variable(0)
        >>> len(step.values)
        2
        >>> strategy.close()
        """
        return Scope(self, self._placement)

    def run(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``fn`` once per replica, in parallel, each call in its replica context.

        Parameters
        ----------
        fn : callable
            Runs for replica 0 on the calling thread, for the others on threads of the strategy.
            Python code shares the interpreter lock; NumPy and nogil Numba code runs in parallel.
        args : list or tuple
            Positional arguments.
        kwargs : dict, optional
            Keyword arguments. Distributed values in ``args`` and ``kwargs``, at any depth, are
            replaced by the replica's component; variables are passed as they are.

        Returns
        -------
        PerReplica, or a pytree of them
            One result per replica of this process. None only if every replica returned None.

        Raises
        ------
        Exception
            The exception of a replica, unchanged: that of the lowest replica that raised by
            itself. Those of other replicas are attached as notes. The next run works.
        CollectiveMismatchError
            The replicas disagreed in a collective. The next run works.
        ContextError
            Called in replica context, under another strategy's scope, or after ``close``.
        TypeError
            ``fn`` is not callable, or is a coroutine or generator function.
        ValueError
            ``args`` or ``kwargs`` have the wrong type, or the replicas returned different
            structures.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.run(lambda x: 10 * x, args=(dv.PerReplica([1, 2]),)))
        PerReplica(0: 10, 1: 20)
        """
        frame = context.require_cross_replica(self._placement, "run", True)
        # The common case, without a call.
        if type(fn) is not FunctionType or fn.__code__.co_flags & function_checks.REFUSED:
            if type(fn) is CompiledStep:
                if debugging.active is None:
                    return self._run_compiled(fn, frame, args, kwargs)
                fn = fn.fn  # whose values debug mode can check
            function_checks.check("run", fn)
        if not isinstance(args, (list, tuple)):
            given = f"got {type(args).__name__}; write run(fn, args=(x,))"
            raise ValueError(f"run: positional args must be a list or tuple, {given}")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ValueError(f"run: kwargs must be a dict, got {type(kwargs).__name__}")
        placement = self._placement
        positional: list[tuple[Any, ...]] = [()] * placement.num_local
        named: list[dict[str, Any]] = [{}] * placement.num_local
        if args:
            positional = operands.components(tuple(args), "run", placement)
        if kwargs:
            named = operands.components(dict(kwargs), "run", placement)

        def replica(step: Rendezvous, rank: int) -> Any:
            here = ReplicaContext(placement, step, rank, self)
            context.enter(Frame(placement, self, here))
            return fn(*positional[rank], **named[rank])

        nested = frame is not None and frame.merging
        watch = debugging.active
        if watch is not None and not nested:
            watch.next_step()
        try:
            results = self._runner.run(replica, nested)
        except BaseException as error:
            tracebacks.trim(error)
            raise
        if watch is not None and not nested:
            when = f"after a step of {placement.name}"
            drift.check(variables_of(placement), placement.workers, when)
        return regroup.regroup(results, placement.replica_devices, placement)

    # The names that tf.distribute gives to the same methods.
    experimental_distribute_dataset = DatasetDistribution.distribute_dataset
    experimental_local_results = CrossReplica.local_results
    experimental_distribute_values_from_function = PerReplicaValues.distribute_values_from_function
