"""The strategy: devices, a communicator, and a placement of variables on the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import numpy as np

from dvkernels import context, pytree, reduce_op
from dvkernels.communicators import registry as communicators
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.single import Single
from dvkernels.context import Frame
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset, EpochCount, EpochCounts
from dvkernels.data.distributed.input_context import InputContext
from dvkernels.data.distributed.options import InputOptions
from dvkernels.data.distributed.worker_share import WorkerShare
from dvkernels.devices import array_memory, registry
from dvkernels.devices.array_spec import spec
from dvkernels.devices.device import Device
from dvkernels.devices.replica_streams import StreamOrder
from dvkernels.errors import (
    BufferMismatchError,
    ContextError,
    DatasetError,
    SynchronizationError,
)
from dvkernels.profiler import debugging
from dvkernels.pytree import describe_structure
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.replica_context import ReplicaContext
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.replicas.runner import Runner
from dvkernels.replicas.streams import StreamedRunner
from dvkernels.strategies.reduction import reduce_along
from dvkernels.user_errors import brief
from dvkernels.values import function_checks, regroup
from dvkernels.values.array_leaves import as_array, prepare_gather, with_common_dtype
from dvkernels.values.distributed import DistributedValues, Mirrored, PerReplica, is_integer
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound
from dvkernels.variables import drift
from dvkernels.variables.drafts import commit_drafts, drafts_of, end_drafts
from dvkernels.variables.modes import VariableSynchronization
from dvkernels.variables.variable import Variable, copies_of, variables_of

__all__ = ["Strategy", "ValueContext"]


class ValueContext:
    """The replica for which the function of ``distribute_values_from_function`` makes a value.

    Attributes
    ----------
    replica_id_in_sync_group : int
        The id of the replica, from 0.
    num_replicas_in_sync : int
        The number of replicas, over all workers.
    """

    __slots__ = ("num_replicas_in_sync", "replica_id_in_sync_group")

    def __init__(self, replica_id_in_sync_group: int, num_replicas_in_sync: int) -> None:
        self.replica_id_in_sync_group = replica_id_in_sync_group
        self.num_replicas_in_sync = num_replicas_in_sync


# The verb that error messages name when workers disagree about an input step.
_READ = "next(iterator) of a distributed dataset"


class Strategy(ProcessBound):
    """Distribution of a computation over replicas: devices, a communicator, a home for variables.

    Use one of the final subclasses, or call this constructor for a strategy of your own.

    Parameters
    ----------
    devices : sequence of Device or str, optional
        One per replica, all of one kind; a device may be named several times. If not given, all
        GPUs, or one replica per usable core where there is no GPU.
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

    Raises
    ------
    DeviceError
        A device does not exist, the list is empty, or it mixes CPU devices and GPUs.
    AlgorithmError
        The communicator has another size, or the object lacks methods of the protocol.
    ValueError
        ``bytes_per_bucket`` is not a positive integer.

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
        devices: Sequence[Device | str] | None,
        communicator: Communicator | str = "auto",
        *,
        bytes_per_bucket: int | None = None,
        central_device: Device | str | None = None,
        workers: Workers | None = None,
    ) -> None:
        resolved = registry.resolve_all(devices)
        if bytes_per_bucket is not None:
            if not is_integer(bytes_per_bucket) or bytes_per_bucket <= 0:
                raise ValueError(
                    f"bytes_per_bucket is a positive integer, got {bytes_per_bucket!r}"
                )
            bytes_per_bucket = int(bytes_per_bucket)
        central = None if central_device is None else registry.resolve(central_device)
        workers = Single() if workers is None else workers
        memory = array_memory.of(resolved)
        workers = communicators.for_any_memory(workers, memory is not array_memory.HOST)
        counts, between_all, background = communicators.between_all(
            resolved, communicator, workers, bytes_per_bucket
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
        )
        announce = workers.announce if workers.size > 1 else None
        self._runner: Runner | StreamedRunner = Runner(
            len(resolved), name, self._placement.first_replica, announce, self._placement.step_lock
        )
        if self._placement.memory is not array_memory.HOST:
            order = StreamOrder([device.index for device in resolved])
            self._runner = StreamedRunner(self._runner, order)

    # -- description -----------------------------------------------------------------------------

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

    def close(self) -> None:
        """End the replica threads. Variables stay readable; ``run`` raises ``ContextError``."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- contexts -------------------------------------------------------------------------------

    def scope(self) -> Scope:
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
        frame = context.require_cross_replica(self._placement, "run")
        function_checks.check("run", fn)
        if not isinstance(args, (list, tuple)):
            raise ValueError(
                f"run: positional args must be a list or tuple, got {type(args).__name__}; "
                f"write run(fn, args=(x,))"
            )
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ValueError(f"run: kwargs must be a dict, got {type(kwargs).__name__}")
        placement = self._placement
        num_local = placement.num_local
        positional = self._components(tuple(args), "run") if args else [()] * num_local
        named = self._components(dict(kwargs), "run") if kwargs else [{}] * num_local

        def replica(step: Rendezvous, rank: int) -> Any:
            here = ReplicaContext(placement, step, rank, self)
            context.enter(Frame(placement, self, here))
            return fn(*positional[rank], **named[rank])

        nested = frame is not None and frame.merging
        watch = debugging.active
        if watch is not None and not nested:
            watch.next_step()
        results = self._runner.run(replica, nested)
        if watch is not None and not nested:
            when, variables = f"after a step of {placement.name}", variables_of(placement)
            drift.check(variables, when)
            drift.check_over_workers(variables, placement.workers, when)
        return regroup.regroup(results, placement.replica_devices, placement)

    # -- collectives in cross-replica context ---------------------------------------------------

    def reduce(
        self, op: Reduction | str, value: Any, axis: int | Sequence[int] | None = None
    ) -> Any:
        """Reduce one value per replica to one array.

        Parameters
        ----------
        op : ReduceOp, CustomReduction or str
            The reduction, or its name.
        value : PerReplica, Mirrored or Variable, or a pytree of them
            Arrays of one shape and one dtype that ``op`` supports; with ``axis``, lengths along
            it may differ. A variable counts as one value per replica. Unchanged.
        axis : int or list of int, optional
            Also reduce each replica's elements along these axes. MEAN is then weighted by their
            number, so uneven batches give the mean of all examples; sums and products of bool and
            of integers narrower than 64 bits have NumPy's wider dtype.

        Returns
        -------
        array, or a pytree of them
            The reduction: a new array that the caller owns.

        Raises
        ------
        ValueError
            ``value`` is not distributed, an axis is out of range, or MEAN, MIN or MAX along
            ``axis`` has no elements.
        ContextError
            Called in replica context or under another strategy's scope, or ``value`` belongs to
            another strategy.
        BufferMismatchError, NotABufferError, UnsupportedDTypeError, ReduceOpError, TypeError
            The replicas' shapes or dtypes differ, are not reducible, or ``op`` or ``axis`` is
            malformed. ``value`` is unchanged.

        Examples
        --------
        >>> import dvkernels as dv
        >>> losses = dv.PerReplica([[1.0, 2.0, 3.0], [4.0]])
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.reduce("mean", losses, axis=0))
        2.5
        """
        context.require_cross_replica(self._placement, "reduce")
        reduction = reduce_op.parse(op)
        communicator, workers = self._placement.communicator, self._placement.workers

        def reduce_leaf(leaf: Any) -> Any:
            arrays = self._arrays("reduce", leaf)
            if axis is not None:
                total = reduce_along(reduction, arrays, axis, communicator, workers)
            else:
                reduce_op.check_dtype("reduce", reduction, arrays[0].dtype)
                _check_alike("reduce", arrays)
                total = communicator.reduce(arrays, reduction)
            return array_memory.holding(total).like(total, leaf.values[0])

        return pytree.map_leaves(reduce_leaf, value)

    def gather(self, value: Any, axis: int = 0) -> Any:
        """Concatenate one value per replica along ``axis``, in replica order.

        Parameters
        ----------
        value : PerReplica, Mirrored or Variable, or a pytree of them
            Arrays of one dtype and one shape, except for the lengths along ``axis``. Scalars are
            stacked. Strings of fixed width get the widest width. Unchanged.
        axis : int
            The axis of concatenation; a negative axis counts from the end.

        Returns
        -------
        array, or a pytree of them
            The concatenation: a new array that the caller owns.

        Raises
        ------
        ValueError
            ``value`` is not distributed, or ``axis`` is out of range.
        BufferMismatchError
            Dtypes, or lengths along the other axes, differ.
        ContextError
            As for :meth:`reduce`.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.gather(dv.PerReplica([[1, 2], [3]])))
        [1 2 3]
        """
        context.require_cross_replica(self._placement, "gather")

        def gather_leaf(leaf: Any) -> Any:
            arrays = self._arrays("gather", leaf)
            ready, axes, described = prepare_gather("gather", arrays, axis, 0)
            for rank, spec_here in enumerate(described):
                if spec_here != described[0]:
                    raise BufferMismatchError(
                        f"gather along axis {axis} needs one dtype, and one length along every "
                        f"other axis: replica 0 holds {described[0]}, "
                        f"replica {rank} holds {spec_here}"
                    )
            placement = self._placement
            ready = [*with_common_dtype(ready, placement.workers)]
            whole = placement.communicator.all_gather(ready, axes[0])[0]
            return array_memory.holding(whole).like(whole, leaf.values[0])

        return pytree.map_leaves(gather_leaf, value)

    def local_results(self, value: Any) -> tuple[Any, ...]:
        """Return the components of a distributed value, one per replica of this process.

        Parameters
        ----------
        value : object
            A distributed value, or a pytree that contains some. A plain value, or a plain leaf,
            is repeated for each replica.

        Returns
        -------
        tuple
            One component per local replica; for a pytree, one pytree per local replica.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.local_results({"loss": dv.PerReplica([0.5, 0.25])}))
        ({'loss': 0.5}, {'loss': 0.25})
        """
        return tuple(self._components(value, "local_results", variables=True))

    def distribute_values_from_function(self, fn: Callable[[ValueContext], Any]) -> Any:
        """Return a ``PerReplica`` of the values that ``fn`` makes, one per replica.

        Parameters
        ----------
        fn : callable
            Called as ``fn(ctx)`` with a :class:`ValueContext`, once per replica of this process,
            in replica order, on the calling thread.

        Returns
        -------
        PerReplica, or a pytree of them
            The values as ``fn`` returned them.

        Raises
        ------
        ValueError
            ``fn`` returned different structures for different replicas.
        ContextError
            Called in replica context or under another strategy's scope.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.distribute_values_from_function(
        ...         lambda ctx: ctx.replica_id_in_sync_group + 10))
        PerReplica(0: 10, 1: 11)
        """
        context.require_cross_replica(self._placement, "distribute_values_from_function")
        function_checks.check("distribute_values_from_function", fn)
        first, num_replicas = self._placement.first_replica, self.num_replicas_in_sync
        local = range(first, first + self._placement.num_local)
        made = [fn(ValueContext(replica, num_replicas)) for replica in local]
        flat = [pytree.flatten(result) for result in made]
        for replica, (_, structure) in zip(local, flat, strict=True):
            if structure != flat[0][1]:
                raise ValueError(
                    f"distribute_values_from_function: replica {first} got "
                    f"{describe_structure(flat[0][1])}, replica {replica} "
                    f"{describe_structure(structure)}; return the same structure for every replica"
                )
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        return pytree.unflatten(flat[0][1], [self._per_replica(column) for column in columns])

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float64) -> PerReplica[Any]:
        """Return a ``PerReplica`` of uninitialized arrays for use in every step, such as gradients.

        Where workers of one host share memory, these arrays lie in symmetric memory: collectives
        in place reduce them where they lie, with all threads of the workers. Other arrays are
        staged through shared memory by one thread per worker.

        Parameters
        ----------
        shape : int or sequence of int
            The shape of each array.
        dtype : dtype
            A numeric dtype or bool; not object.

        Returns
        -------
        PerReplica
            One array of this shape and dtype on the device of each replica of this process, with
            arbitrary content.

        Raises
        ------
        ValueError, TypeError, UnsupportedDTypeError
            The shape is malformed, or the dtype cannot be reduced.
        ContextError
            Called in replica context or under another strategy's scope.
        CollectiveMismatchError
            Over several workers: their calls differ.
        DeviceError
            Over several workers of one host: the host has too little shared memory. Raised on
            all of them; nothing has been allocated.

        Notes
        -----
        Over several workers all must make the same calls in the same order. The memory of an array
        is reused once the arrays of all workers have been dropped. For a reduction in place every
        worker must pass arrays of the same ``empty``, or the same slices of them. A process forked
        from a worker shares the worker's arrays; it gets no copies.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     gradients = strategy.empty(3, "float32")
        ...     def step(own):
        ...         own[:] = dv.get_replica_context().replica_id_in_sync_group
        ...         return dv.get_replica_context().all_reduce("mean", own, out=own)
        ...     print(strategy.run(step, args=(gradients,))[0])
        [0.5 0.5 0.5]
        """
        context.require_cross_replica(self._placement, "empty")
        kind = np.dtype(dtype)
        reduce_op.check_dtype("empty", ReduceOp.MAX if kind.kind == "b" else ReduceOp.SUM, kind)
        extents = _extents(shape)
        placement = self._placement
        is_of_host = placement.memory is array_memory.HOST
        made = placement.workers.empty(extents, kind, placement.num_local if is_of_host else 0)
        if not is_of_host:
            content = np.broadcast_to(np.zeros((), kind), extents)
            made = [placement.memory.new(content, device) for device in placement.replica_devices]
        return self._per_replica(made)

    def reduce_to(self, op: Reduction | str, value: Any, destinations: Any) -> Any:
        """Reduce one value per replica, and mirror the result on the destinations.

        Parameters
        ----------
        op : ReduceOp, CustomReduction or str
            The reduction, or its name.
        value : PerReplica, Mirrored or Variable, or a pytree of them
            Arrays of one shape and dtype, as for :meth:`reduce`. Unchanged.
        destinations : Variable, DistributedValues, Device or str
            The devices of a variable or value, or one device.

        Returns
        -------
        Mirrored, or a pytree of them
            Read-only, one per destination; destinations in the same memory share one array.

        Raises
        ------
        TypeError, DeviceError
            ``destinations`` has another type, or names a device that does not exist.
        ContextError, ValueError, BufferMismatchError, UnsupportedDTypeError
            As for :meth:`reduce`.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.reduce_to("sum", dv.PerReplica([1.0, 2.0]), "cpu:0"))
        Mirrored(0: array(3.))
        """
        devices = self._devices_of(destinations, "reduce_to")
        return self._mirrored(self.reduce(op, value), devices)

    def batch_reduce_to(self, op: Reduction | str, pairs: Sequence[tuple[Any, Any]]) -> list[Any]:
        """Return ``reduce_to(op, value, destinations)`` for each pair of value and destinations.

        Parameters
        ----------
        op : ReduceOp, CustomReduction or str
            One reduction for all pairs.
        pairs : sequence of (value, destinations)
            As for :meth:`reduce_to`. The destinations of all pairs are checked before the first
            value is reduced.

        Returns
        -------
        list of Mirrored, or of pytrees of them
            One result per pair, in order.

        Raises
        ------
        TypeError
            An item is not a pair. Further errors are those of :meth:`reduce_to`.
        """
        listed: list[Any] = [*pairs]
        for pair in listed:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    "batch_reduce_to needs pairs of a value and its destinations; got "
                    f"{brief(pair)}"
                )
        places = [self._devices_of(destinations, "batch_reduce_to") for _, destinations in listed]
        reduced = self.reduce(op, [value for value, _ in listed])
        return [
            self._mirrored(result, devices) for result, devices in zip(reduced, places, strict=True)
        ]

    def broadcast_to(self, value: Any, destinations: Any) -> Any:
        """Mirror one value on the destinations.

        Parameters
        ----------
        value : array or number, Mirrored or Variable, or a pytree of them
            Of any shape and any dtype but object. Copied; over several workers, the value of the
            first worker is taken.
        destinations : Variable, DistributedValues, Device or str
            The devices of a variable or value, or one device.

        Returns
        -------
        Mirrored, or a pytree of them
            Read-only, one per destination; destinations in the same memory share one array.

        Raises
        ------
        ValueError
            ``value`` is a ``PerReplica``, which holds several values.
        TypeError, DeviceError
            ``destinations`` has another type, or names a device that does not exist.
        ContextError
            Called in replica context or under another strategy's scope.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.broadcast_to(2.5, dv.PerReplica([0, 0])))
        Mirrored(0: array(2.5), 1: array(2.5))
        """
        context.require_cross_replica(self._placement, "broadcast_to")
        devices = self._devices_of(destinations, "broadcast_to")

        def broadcast_leaf(leaf: Any) -> Any:
            if isinstance(leaf, DistributedValues):
                self._check_fits("broadcast_to", leaf)
            whole = leaf.read_value() if isinstance(leaf, Variable) else leaf
            if isinstance(whole, PerReplica):
                raise ValueError(
                    "broadcast_to mirrors one value, and a PerReplica holds one per replica; "
                    "choose it with .on(replica_id), or use reduce_to"
                )
            single = whole.at(0) if isinstance(whole, Mirrored) else whole
            array = as_array(single, "broadcast_to", 0, self._placement.memory)
            array = self._placement.broadcast_from_chief(array)
            return array_memory.holding(array).copy_to_device_of(array, array)

        return self._mirrored(pytree.map_leaves(broadcast_leaf, value), devices)

    def update(
        self,
        variable: Variable,
        fn: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        group: bool = True,
    ) -> Any:
        """Call ``fn(copy, *args, **kwargs)`` on every copy of a variable, in turn.

        Parameters
        ----------
        variable : Variable
            A variable of this strategy.
        fn : callable
            Receives each copy as a variable of one device, with the same methods. It runs in
            cross-replica context, and must do the same to every copy of an ON_WRITE variable.
        args : list or tuple
            Positional arguments after the copy.
        kwargs : dict, optional
            Keyword arguments. Distributed values in ``args`` and ``kwargs`` are replaced by the
            component of the copy.
        group : bool
            True to return a ``Mirrored`` of the results, False for a tuple.

        Returns
        -------
        Mirrored, a pytree of them, or tuple
            The results of ``fn``, one per copy; None if ``fn`` returned None for every copy.

        Raises
        ------
        SynchronizationError
            A ``PerReplica`` among the arguments of an ON_WRITE variable, whose copies are equal.
        ContextError
            Called in replica context or while another thread runs a step of this strategy, or the
            variable belongs to another strategy.
        TypeError, ValueError
            Not a variable; a coroutine or generator function; malformed ``args`` or ``kwargs``.

        Notes
        -----
        All copies change together, after ``fn`` has returned for each of them: if it raises, all
        copies are as before. A copy that is written needs one more array until then.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     with strategy.scope():
        ...         weight = dv.Variable(1.0)
        ...     strategy.update(weight, lambda copy, x: copy.assign_add(x), args=(2.0,))
        ...     print(weight.numpy())
        3.0
        """
        here = context.require_cross_replica(self._placement, "update")
        function_checks.check("update", fn)
        if not isinstance(variable, Variable):
            raise TypeError(f"update: expected a variable, got a {type(variable).__name__}")
        if variable.owner is not self._placement:
            raise ContextError(
                f"update: variable {variable.name!r} belongs to {variable.owner.name}, not to "
                f"{self._placement.name}"
            )
        context.check_no_step_elsewhere(self._placement, f"update of variable {variable.name!r}")
        if not isinstance(args, (list, tuple)):
            raise ValueError(f"update: args must be a list or tuple, got {type(args).__name__}")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ValueError(f"update: kwargs must be a dict, got {type(kwargs).__name__}")
        given = (tuple(args), dict(kwargs or {}))
        equal = variable.synchronization is VariableSynchronization.ON_WRITE
        if equal and any(isinstance(leaf, PerReplica) for leaf in pytree.leaves(given)):
            raise SynchronizationError(
                f"update of variable {variable.name!r}: its copies are equal, and a PerReplica "
                f"among the arguments would let them drift apart; reduce it first"
            )
        drafts = drafts_of(variable)
        dealt = self._components(given, "update", num_copies=len(drafts))
        frame = Frame(self._placement, self, merging=here is not None and here.merging)
        token = context.enter(frame)
        try:
            results = [
                fn(draft, *positional, **named)
                for draft, (positional, named) in zip(drafts, dealt, strict=True)
            ]
            if debugging.active is not None and equal:
                contents = [copies_of(draft)[0] for draft in drafts]
                drift.compare(f"update of variable {variable.name!r}", contents)
            commit_drafts(variable, drafts)
        finally:
            end_drafts(drafts)
            context.leave(token)
        if not group:
            return tuple(results)
        return regroup.regroup(results, variable.devices, self._placement, Mirrored)

    # -- input ----------------------------------------------------------------------------------

    def distribute_dataset(
        self, dataset: Dataset, options: InputOptions | None = None
    ) -> DistributedDataset:
        """Distribute a dataset: split each batch over the replicas as evenly as possible.

        Parameters
        ----------
        dataset : Dataset
            Its ``batch(size)`` is the global batch.
        options : InputOptions, optional
            Prefetching, sharding, and the policy for elements that fail.

        Returns
        -------
        DistributedDataset
            Its iterators yield a ``PerReplica``, or a pytree of them. The parts of a batch differ
            in size by at most one element, larger parts first.

        Raises
        ------
        DatasetError
            Not a ``Dataset``, or options of another type.
        ContextError
            Called in replica context or under another strategy's scope.

        Notes
        -----
        Each ``iter()`` is the next epoch and is shuffled anew, also where a loop distributes the
        same ``Dataset`` once per epoch. ``dataset.with_epoch(k)`` chooses the epoch.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     for batch in strategy.distribute_dataset(dv.Dataset.range(5).batch(3)):
        ...         print(batch)
        PerReplica(0: array([0, 1]), 1: array([2]))
        PerReplica(0: array([3]), 1: array([4]))
        """
        context.require_cross_replica(self._placement, "distribute_dataset")
        count = self._epochs.of(dataset)
        return self._distributed("distribute_dataset", dataset, options, count, is_dealt=False)

    def distribute_datasets_from_function(
        self, fn: Callable[[InputContext], Dataset], options: InputOptions | None = None
    ) -> DistributedDataset:
        """Distribute a dataset of per-replica batches that ``fn`` makes.

        Parameters
        ----------
        fn : callable
            Called as ``fn(context)`` with an ``InputContext``; returns a dataset, which is neither
            split nor sharded: its elements, batched or not, go to the replicas in turn. Called
            once per worker, for the replicas of that worker. ``context.epoch`` is the epoch of
            the first ``iter()``; it advances when the same function is passed again.
        options : InputOptions, optional
            Prefetching, and the policy for elements that fail.

        Returns
        -------
        DistributedDataset
            If the last step has too few batches, the remaining replicas get empty ones. Unbatched
            elements that do not fill a step raise ``DatasetError`` there.

        Raises
        ------
        DatasetError
            ``fn`` did not return a ``Dataset``, or options of another type.
        ContextError
            Called in replica context or under another strategy's scope.

        Examples
        --------
        >>> import dvkernels as dv
        >>> def make(context):
        ...     return dv.Dataset.range(7).batch(context.get_per_replica_batch_size(4))
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     for batch in strategy.distribute_datasets_from_function(make):
        ...         print(batch)
        PerReplica(0: array([0, 1]), 1: array([2, 3]))
        PerReplica(0: array([4, 5]), 1: array([6]))
        """
        verb = "distribute_datasets_from_function"
        context.require_cross_replica(self._placement, verb)
        function_checks.check(verb, fn)
        workers = self._placement.workers
        count = self._epochs.of(fn)
        made = fn(InputContext(workers.size, workers.rank, self.num_replicas_in_sync, count.next))
        return self._distributed(verb, made, options, count, is_dealt=True)

    # -- shared implementation ------------------------------------------------------------------

    def _distributed(
        self,
        verb: str,
        dataset: Any,
        options: InputOptions | None,
        count: EpochCount,
        *,
        is_dealt: bool,
    ) -> DistributedDataset:
        if not isinstance(dataset, Dataset):
            raise DatasetError(
                f"{verb} expected a dvkernels.Dataset, got a {type(dataset).__name__}; "
                f"make one with Dataset.from_arrays, from_sequence or from_iterable"
            )
        if options is not None and not isinstance(options, InputOptions):
            raise DatasetError(
                f"{verb}: expected options to be a dv.InputOptions, got a {type(options).__name__}"
            )
        placement = self._placement

        def check_context(verb: str) -> None:
            context.require_cross_replica(placement, verb)

        return DistributedDataset(
            dataset,
            placement.num_local,
            self.worker_devices,
            check_context=check_context,
            owner=placement,
            options=options or InputOptions(),
            is_dealt=is_dealt,
            share=WorkerShare(placement.counts, placement.workers.rank),
            exchange=functools.partial(placement.workers.exchange, verb=_READ),
            count=count,
        )

    def _per_replica(self, values: Sequence[Any]) -> PerReplica[Any]:
        return PerReplica(values, devices=self.worker_devices, owner=self._placement)

    def _devices_of(self, destinations: Any, verb: str) -> tuple[Device, ...]:
        if isinstance(destinations, DistributedValues):
            self._check_own(verb, destinations)
            return destinations.devices
        if isinstance(destinations, (Device, str)):
            return (registry.resolve(destinations),)
        raise TypeError(
            f"{verb}: destinations are a variable, a distributed value or a device, got a "
            f"{type(destinations).__name__}"
        )

    def _mirrored(self, tree: Any, devices: tuple[Device, ...]) -> Any:
        owner = self._placement if len(devices) == self._placement.num_local else None

        def mirror(array: Any) -> Mirrored[Any]:
            whole = array_memory.holding(array).read_only(array)
            copies = [array_memory.on_device(whole, device) for device in devices]
            return Mirrored(copies, devices=devices, owner=owner)

        return pytree.map_leaves(mirror, tree)

    def _check_fits(self, verb: str, value: DistributedValues[Any]) -> None:
        self._check_own(verb, value)
        is_variable = isinstance(value, Variable)  # may have a single copy for all replicas
        if len(value.values) != self._placement.num_local and not is_variable:
            self._refuse(verb, value, "")

    def _check_own(self, verb: str, value: DistributedValues[Any]) -> None:
        """Raise if a value belongs to another strategy."""
        owner = getattr(value, "owner", None)
        unscoped = owner is context.UNSCOPED and isinstance(value, Variable)
        if owner is not None and owner is not self._placement and not unscoped:
            whose = f" of {owner.name}" if isinstance(owner, Placement) else ""
            self._refuse(verb, value, whose)

    def _refuse(self, verb: str, value: DistributedValues[Any], whose: str) -> NoReturn:
        raise ContextError(
            f"{verb}: expected one value for each of the {self._placement.num_local} replicas "
            f"of {self._placement.name}, got a {type(value).__name__} of "
            f"{len(value.values)} values{whose}"
        )

    def _components(
        self, tree: Any, verb: str, *, variables: bool = False, num_copies: int | None = None
    ) -> list[Any]:
        """Return one pytree per replica, with each distributed value replaced by its component.

        ``num_copies`` asks for one pytree per copy of a variable instead. Variables are replaced
        only if ``variables`` is true.
        """
        leaves, structure = pytree.flatten(tree)
        distributed = [
            isinstance(leaf, DistributedValues) and (variables or not isinstance(leaf, Variable))
            for leaf in leaves
        ]
        for leaf, is_distributed in zip(leaves, distributed, strict=True):
            if is_distributed and len(leaf.values) != num_copies:
                self._check_fits(verb, leaf)
            elif is_distributed:
                self._check_own(verb, leaf)

        def component(leaf: Any, rank: int) -> Any:
            return leaf.values[rank if len(leaf.values) > 1 else 0]

        return [
            pytree.unflatten(
                structure,
                [
                    component(leaf, rank) if is_distributed else leaf
                    for leaf, is_distributed in zip(leaves, distributed, strict=True)
                ],
            )
            for rank in range(self._placement.num_local if num_copies is None else num_copies)
        ]

    def _arrays(self, verb: str, leaf: Any) -> list[Any]:
        """Return the components of a distributed value as arrays; plain values raise."""
        if not isinstance(leaf, PerReplica | Mirrored | Variable):
            raise ValueError(
                f"{verb}: expected one value per replica (PerReplica, Mirrored or Variable), got a "
                f"plain {type(leaf).__name__}; it is the same on all replicas, so there is nothing "
                f"to {verb}"
            )
        self._check_fits(verb, leaf)
        values = leaf.values
        placement, memory = self._placement, self._placement.memory
        if len(values) < placement.num_local:
            values = values * placement.num_local
        numbered = enumerate(values, placement.first_replica)
        return [as_array(value, verb, replica, memory) for replica, value in numbered]


def _extents(shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple; a malformed shape raises."""
    extents = (shape,) if is_integer(shape) else shape
    if not isinstance(extents, (list, tuple)) or not all(map(is_integer, extents)):
        raise TypeError(f"empty: shape must be an integer or a list of them, got {brief(shape)}")
    if any(extent < 0 for extent in extents):
        raise ValueError(f"empty: lengths must not be negative, got shape {brief(shape)}")
    return tuple(map(int, extents))


def _check_alike(verb: str, arrays: list[Any]) -> None:
    first = spec(arrays[0])
    for rank, array in enumerate(arrays):
        if spec(array) != first:
            raise BufferMismatchError(
                f"{verb} needs one shape and dtype: replica {rank} holds {spec(array)}, replica "
                f"0 holds {first}; pad or cast first, or give the axis to reduce along"
            )


class Scope:
    """Context manager of ``strategy.scope()``; yields the strategy."""

    def __init__(self, strategy: Strategy, placement: Placement) -> None:
        self._strategy = strategy
        self._placement = placement

    def __enter__(self) -> Strategy:
        """Make the strategy the current one."""
        here = context.explicit()
        if here is not None and (here.replica is not None or here.placement is not self._placement):
            context.require_cross_replica(self._placement, "scope")
        merging = here is not None and here.merging
        context.enter(Frame(self._placement, self._strategy, None, merging, self, here))
        return self._strategy

    def __exit__(self, *_: object) -> None:
        """Restore the strategy that was current before."""
        current = frame = context.explicit()
        while frame is not None and frame.scope is not self:
            frame = frame.outer
        if frame is None:
            raise ContextError(
                f"the scope of {self._placement.name} was left without having been entered; use it "
                f"in a with statement"
            )
        if frame is not current:
            raise ContextError(
                f"the scope of {self._placement.name} was left out of order; leave the inner scope "
                f"first (use with statements)"
            )
        context.enter(frame.outer)  # one store: an interrupt finds the scope entered or left


def set_strategy(strategy: Strategy | None) -> None:
    """Set the strategy of the whole process, for all code outside every scope.

    Parameters
    ----------
    strategy : Strategy or None
        Applies as if its scope were entered; None resets to the default strategy.

    Raises
    ------
    ContextError
        Called inside a scope or a ``run``: meant to be called once, at the start of a program.
    TypeError
        Not a strategy.

    Examples
    --------
    >>> import dvkernels as dv
    >>> strategy = dv.MirroredStrategy(["cpu:0", "cpu:1"])
    >>> dv.set_strategy(strategy)
    >>> dv.get_strategy() is strategy
    True
    >>> dv.set_strategy(None)
    >>> strategy.close()
    """
    if context.explicit() is not None:
        raise ContextError(
            "set_strategy must not be called inside a strategy's scope or run; call it at the "
            "start of the program"
        )
    if strategy is None:
        context.set_global(None)
    elif isinstance(strategy, Strategy):
        context.set_global(Frame(strategy._placement, strategy))
    else:
        raise TypeError(f"set_strategy expected a strategy or None, got {type(strategy).__name__}")


# The names that tf.distribute gives to the same methods.
_OTHER_NAMES = {
    "experimental_distribute_dataset": "distribute_dataset",
    "experimental_local_results": "local_results",
    "experimental_distribute_values_from_function": "distribute_values_from_function",
}
for _other, _method in _OTHER_NAMES.items():
    setattr(Strategy, _other, getattr(Strategy, _method))
