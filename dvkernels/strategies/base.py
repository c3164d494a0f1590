"""A strategy: devices, a communicator, and a placement of variables on the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import Token
from typing import Any, NoReturn, Self

import numpy as np

from dvkernels import context, reduce_op
from dvkernels.communicators import registry as communicators
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.single import Single
from dvkernels.context import Frame, ReplicaContext
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.input_context import InputContext
from dvkernels.data.distributed.options import InputOptions
from dvkernels.data.distributed.worker_share import WorkerShare
from dvkernels.data.epoch_count import EpochCount, EpochCounts
from dvkernels.devices import array_memory, registry
from dvkernels.devices.base import Device
from dvkernels.devices.buffers import spec
from dvkernels.devices.replica_streams import StreamOrder
from dvkernels.errors import (
    BufferMismatchError,
    ContextError,
    DatasetError,
    SynchronizationError,
)
from dvkernels.nest import words_of
from dvkernels.profiler import debugging
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.replicas.runner import Runner
from dvkernels.replicas.streams import StreamedRunner
from dvkernels.strategies.reduction import reduce_along
from dvkernels.user_errors import shown
from dvkernels.values import function_checks, regroup
from dvkernels.values.array_leaves import alike, as_array, gatherable
from dvkernels.values.distributed import DistributedValues, Mirrored, PerReplica, is_integer
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound
from dvkernels.variables import drift
from dvkernels.variables.modes import VariableSynchronization
from dvkernels.variables.variable import (
    Variable,
    commit,
    copies_of,
    drafts_of,
    end,
    living_in,
)

__all__ = ["Strategy", "ValueContext"]


class ValueContext:
    """Which replica a value is made for, in ``distribute_values_from_function``."""

    __slots__ = ("num_replicas_in_sync", "replica_id_in_sync_group")

    def __init__(self, replica_id_in_sync_group: int, num_replicas_in_sync: int) -> None:
        self.replica_id_in_sync_group = replica_id_in_sync_group
        self.num_replicas_in_sync = num_replicas_in_sync


_READ = "next(iterator) of a distributed dataset"  # what workers agree on, in messages


class Strategy(ProcessBound):
    """How a computation is spread over replicas: devices, a communicator, a place for variables.

    Use one of its final kinds, or make your own by calling this constructor.

    Parameters
    ----------
    devices : sequence of Device or str, optional
        One per replica, of one kind; a device may be named twice. All GPUs if not given, or else
        one per usable core.
    communicator : Communicator or str
        Of as many ranks; or a name, as ``MirroredStrategy`` takes.
    bytes_per_bucket : int, optional
        Pack the arrays of a nest into buckets of so many bytes for ``all_reduce``.
    central_device : Device or str, optional
        Keep a single copy of each variable there, instead of one per replica.
    workers : Workers, optional
        The other processes, each with replicas of its own; ``devices`` and ``communicator`` are
        those of this one. This process alone if not given.

    Raises
    ------
    DeviceError
        A device that does not exist, or none; CPU devices and GPUs together.
    AlgorithmError
        A communicator of another size, or an object that lacks its methods.
    ValueError
        ``bytes_per_bucket`` is not a positive integer.

    Notes
    -----
    A strategy is a context manager that closes itself. Its threads are made at the first ``run``
    and end with it: by ``close()``, ``with``, or when it is dropped.
    """

    _bound_by = (
        "its threads are of this process, and its variables belong to it alone; make another one "
        "where it is needed, and take along what variables hold with dv.Checkpoint, or as arrays "
        "(v.numpy())"
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
        held = array_memory.of(resolved)
        workers = communicators.for_any_memory(workers, held is not array_memory.HOST)
        counts, all_over, background = communicators.between_all(
            resolved, communicator, workers, bytes_per_bucket
        )
        name = f"{type(self).__name__}({', '.join(str(device) for device in resolved)})"
        if workers.size > 1:
            name += f" on worker {workers.rank} of {workers.size}"
        self._epochs = EpochCounts()
        self._placement = Placement(
            resolved,
            all_over,
            name,
            central,
            workers=workers,
            replicas_of_workers=tuple(counts),
            background=background,
        )
        announce = workers.announce if workers.size > 1 else None
        self._runner: Runner | StreamedRunner = Runner(
            len(resolved), name, self._placement.first_replica, announce, self._placement.turn
        )
        if self._placement.memory is not array_memory.HOST:
            order = StreamOrder([device.index for device in resolved])
            self._runner = StreamedRunner(self._runner, order)

    # -- what it is -----------------------------------------------------------------------------

    @property
    def num_replicas_in_sync(self) -> int:
        """The number of replicas that a batch is divided over."""
        return self._placement.num_replicas

    @property
    def worker_devices(self) -> tuple[Device, ...]:
        """Where the replicas of this process compute, in replica order."""
        return self._placement.replica_devices

    @property
    def parameter_devices(self) -> tuple[Device, ...]:
        """Where variables live."""
        return self._placement.copy_devices

    @property
    def cluster_resolver(self) -> Any:
        """Who told where this process stands among others; None: all replicas are in it."""
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

        Variables created inside get one copy per replica. May be entered again inside itself.
        Inside another strategy's scope, or in a replica, entering raises ``ContextError``.
        """
        return Scope(self, self._placement)

    def run(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``fn`` once per replica, at the same time, each in its replica context.

        Parameters
        ----------
        fn : callable
            Runs for replica 0 on the calling thread, for the others on threads of the strategy;
            Python code shares the interpreter, NumPy and nogil Numba code runs in parallel.
        args : list or tuple
        kwargs : dict, optional
            Distributed values in them, at any depth, are replaced by the replica's component;
            variables are passed as they are.

        Returns
        -------
        PerReplica, or a nest of them
            None only if every replica returned None.

        Raises
        ------
        Exception
            What a replica raised, as it is: of the lowest replica that raised by itself.
        CollectiveMismatchError
            The replicas disagreed in a collective. The next run works.
        ContextError
            Called in a replica, under another strategy's scope, or after ``close``.
        ValueError
            The replicas returned different structures.
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
        positional = self._dealt(tuple(args), "run") if args else [()] * num_local
        named = self._dealt(dict(kwargs), "run") if kwargs else [{}] * num_local

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
            when, variables = f"after a step of {placement.name}", living_in(placement)
            drift.check(variables, when)
            drift.check_over_workers(variables, placement.workers, when)
        return regroup.regroup(results, placement.replica_devices, placement)

    # -- bringing values together ---------------------------------------------------------------

    def reduce(
        self, op: Reduction | str, value: Any, axis: int | Sequence[int] | None = None
    ) -> Any:
        """Reduce one value per replica to one array.

        Parameters
        ----------
        op : ReduceOp or str
        value : PerReplica, Mirrored or Variable, or a nest of them
            A variable counts as one value per replica. Plain values raise ValueError.
        axis : int or list of int, optional
            Also reduce each replica's elements along these axes; MEAN weighs replicas by their
            number of elements, so uneven batches give the mean of all examples. Sums and products
            of small integers and bool are as wide as NumPy's.

        Returns
        -------
        array, or a nest of them
            New, owned by the caller.
        """
        context.require_cross_replica(self._placement, "reduce")
        reduction = reduce_op.parse(op)
        communicator, workers = self._placement.communicator, self._placement.workers

        def one(leaf: Any) -> Any:
            arrays = self._arrays("reduce", leaf)
            if axis is not None:
                total = reduce_along(reduction, arrays, axis, communicator, workers)
            else:
                reduce_op.check_dtype("reduce", reduction, arrays[0].dtype)
                _check_alike("reduce", arrays)
                total = communicator.reduce(arrays, reduction)
            return array_memory.holding(total).like(total, leaf.values[0])

        return regroup.map_leaves(one, value)

    def gather(self, value: Any, axis: int = 0) -> Any:
        """Concatenate one value per replica along ``axis``, in replica order.

        Lengths along ``axis`` may differ; scalars are stacked; strings are as wide as the widest.
        Returns a new array, or a nest.
        """
        context.require_cross_replica(self._placement, "gather")

        def one(leaf: Any) -> Any:
            arrays = self._arrays("gather", leaf)
            ready, axes, described = gatherable("gather", arrays, axis, 0)
            for rank, held in enumerate(described):
                if held != described[0]:
                    raise BufferMismatchError(
                        f"gather along axis {axis} needs one dtype, and one length along every "
                        f"other axis: replica 0 holds {described[0]}, replica {rank} holds {held}"
                    )
            placement = self._placement
            ready = [*alike(ready, placement.workers)]
            whole = placement.communicator.all_gather(ready, axes[0])[0]
            return array_memory.holding(whole).like(whole, leaf.values[0])

        return regroup.map_leaves(one, value)

    def local_results(self, value: Any) -> tuple[Any, ...]:
        """Return what each replica of this process holds, as a tuple.

        Of a nest, a tuple of nests. A plain value stands for each replica.
        """
        return tuple(self._dealt(value, "local_results", variables=True))

    def distribute_values_from_function(self, fn: Callable[[ValueContext], Any]) -> Any:
        """Return a ``PerReplica`` of ``fn(ctx)``, one call per replica of this process in order.

        ``ctx`` has ``replica_id_in_sync_group`` and ``num_replicas_in_sync``. A nest gives a nest
        of ``PerReplica``.
        """
        context.require_cross_replica(self._placement, "distribute_values_from_function")
        function_checks.check("distribute_values_from_function", fn)
        first, num_replicas = self._placement.first_replica, self.num_replicas_in_sync
        local = range(first, first + self._placement.num_local)
        made = [fn(ValueContext(replica, num_replicas)) for replica in local]
        flat = [regroup.flatten(result) for result in made]
        for replica, (_, structure) in zip(local, flat, strict=True):
            if structure != flat[0][1]:
                raise ValueError(
                    f"distribute_values_from_function: replica {first} got "
                    f"{words_of(flat[0][1])}, replica {replica} {words_of(structure)}; return "
                    f"the same nest for every replica"
                )
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        return regroup.unflatten(flat[0][1], [self._per_replica(column) for column in columns])

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float64) -> PerReplica[Any]:
        """Return a ``PerReplica`` of new arrays, one for each replica of this process.

        Made to be computed into and reduced in place, step after step: gradients, for instance.
        Where processes of one host share memory, collectives reduce such arrays where they lie,
        by all threads of the processes; others are copied through it by one thread of each.

        Parameters
        ----------
        shape : int or sequence of int
        dtype : dtype
            Of numbers or bool; not of objects.

        Returns
        -------
        PerReplica
            Arrays on the devices of the replicas. What they hold is not set.

        Raises
        ------
        ValueError, TypeError, UnsupportedDTypeError
            No shape, or no dtype that can be reduced.
        ContextError
            In replica context.
        CollectiveMismatchError
            Over several workers: they do not all call this alike.
        DeviceError
            Over several workers of one host: it has not enough memory that processes can share.
            Raised on all of them; nothing has been taken.

        Notes
        -----
        Over several workers all make the same calls in the same order. An array's memory is taken
        again after the arrays of all workers have been dropped. What is reduced in place has to
        lie alike on all workers: the arrays of one ``empty``, or the same slices of them. A process
        forked from a worker sees the worker's, not a copy.

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
            made = [placement.memory.new(content, one) for one in placement.replica_devices]
        return self._per_replica(made)

    def reduce_to(self, op: Reduction | str, value: Any, destinations: Any) -> Any:
        """Reduce one value per replica, and mirror the result where ``destinations`` says.

        Parameters
        ----------
        op : ReduceOp or str
        value : PerReplica, Mirrored or Variable, or a nest of them
        destinations : Variable, DistributedValues, Device or str
            The devices of a variable or value, or one device.

        Returns
        -------
        Mirrored, or a nest of them
            Of one read-only array that the devices of this process share.
        """
        devices = self._devices_of(destinations, "reduce_to")
        return self._mirrored(self.reduce(op, value), devices)

    def batch_reduce_to(self, op: Reduction | str, pairs: Sequence[tuple[Any, Any]]) -> list[Any]:
        """Return ``reduce_to(op, value, destinations)`` of each pair of those two.

        All pairs are checked before the first is reduced.
        """
        listed: list[Any] = [*pairs]
        for pair in listed:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    "batch_reduce_to needs pairs of a value and its destinations; got "
                    f"{shown(pair)}"
                )
        places = [self._devices_of(destinations, "batch_reduce_to") for _, destinations in listed]
        reduced = self.reduce(op, [value for value, _ in listed])
        return [self._mirrored(one, devices) for one, devices in zip(reduced, places, strict=True)]

    def broadcast_to(self, value: Any, destinations: Any) -> Any:
        """Mirror one value where ``destinations`` says.

        Parameters
        ----------
        value : array or number, Mirrored or Variable, or a nest of them
            Copied; over several workers, that of the first. A ``PerReplica`` holds several and
            raises ValueError.
        destinations : Variable, DistributedValues, Device or str

        Returns
        -------
        Mirrored, or a nest of them
            Of one read-only array that the devices of this process share.
        """
        context.require_cross_replica(self._placement, "broadcast_to")
        devices = self._devices_of(destinations, "broadcast_to")

        def one(leaf: Any) -> Any:
            if isinstance(leaf, DistributedValues):
                self._check_fits("broadcast_to", leaf)
            whole = leaf.read_value() if isinstance(leaf, Variable) else leaf
            if isinstance(whole, PerReplica):
                raise ValueError(
                    "broadcast_to: a PerReplica holds one value per replica, and one is mirrored; "
                    "choose it with .on(replica_id), or use reduce_to"
                )
            single = whole.at(0) if isinstance(whole, Mirrored) else whole
            array = as_array(single, "broadcast_to", 0, self._placement.memory)
            array = self._placement.of_chief(array)
            return array_memory.holding(array).beside(array, array)

        return self._mirrored(regroup.map_leaves(one, value), devices)

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
            Of this strategy.
        fn : callable
            Gets each copy as a variable of one device, with the same methods. It runs in
            cross-replica context, and must do the same to every copy of an ON_WRITE variable.
        args, kwargs
            Distributed values in them are replaced by the component of the copy; a ``PerReplica``
            raises ValueError for an ON_WRITE variable, whose copies are equal.
        group : bool
            Return a ``Mirrored`` of the results, else a tuple of them.

        Returns
        -------
        Mirrored, a nest of them, or tuple
            What ``fn`` returned for each copy; None if that was None for all.

        Notes
        -----
        The copies change together when ``fn`` has returned for all of them: if it raises, all are
        as before. A copy that is written takes one more array meanwhile.
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
        context.check_turn(self._placement, f"update of variable {variable.name!r}")
        if not isinstance(args, (list, tuple)):
            raise ValueError(f"update: args must be a list or tuple, got {type(args).__name__}")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ValueError(f"update: kwargs must be a dict, got {type(kwargs).__name__}")
        given = (tuple(args), dict(kwargs or {}))
        equal = variable.synchronization is VariableSynchronization.ON_WRITE
        if equal and any(isinstance(leaf, PerReplica) for leaf in regroup.flatten(given)[0]):
            raise SynchronizationError(
                f"update of variable {variable.name!r}: its copies are equal, and a PerReplica "
                f"among the arguments would let them drift apart; reduce it first"
            )
        drafts = drafts_of(variable)
        dealt = self._dealt(given, "update", of=len(drafts))
        frame = Frame(self._placement, self, merging=here is not None and here.merging)
        token = context.enter(frame)
        try:
            results = [
                fn(draft, *positional, **named)
                for draft, (positional, named) in zip(drafts, dealt, strict=True)
            ]
            if debugging.active is not None and equal:
                held = [copies_of(draft)[0] for draft in drafts]
                drift.compare(f"update of variable {variable.name!r}", held)
            commit(variable, drafts)
        finally:
            end(drafts)
            context.leave(token)
        if not group:
            return tuple(results)
        return regroup.regroup(results, variable.devices, self._placement, Mirrored)

    # -- input ----------------------------------------------------------------------------------

    def distribute_dataset(
        self, dataset: Dataset, options: InputOptions | None = None
    ) -> DistributedDataset:
        """Split each batch of a dataset over the replicas, as evenly as it goes.

        Parameters
        ----------
        dataset : Dataset
            Its ``batch(size)`` is the global batch.
        options : InputOptions, optional
            Prefetching, and what happens to elements that fail.

        Notes
        -----
        Each ``iter()`` is the next epoch, which is shuffled anew, also where a loop distributes the
        same ``Dataset`` once for each epoch. ``dataset.with_epoch(k)`` says which.
        """
        context.require_cross_replica(self._placement, "distribute_dataset")
        count = self._epochs.of(dataset)
        return self._distributed("distribute_dataset", dataset, options, count, is_dealt=False)

    def distribute_datasets_from_function(
        self, fn: Callable[[InputContext], Dataset], options: InputOptions | None = None
    ) -> DistributedDataset:
        """Distribute a dataset of the replicas' own batches, which ``fn`` makes.

        Parameters
        ----------
        fn : callable
            Gets an ``InputContext`` and returns a dataset, which is neither split nor sharded:
            its elements, batched or not, go to the replicas in turn. Called once; over several
            workers once on each, for the replicas there. ``context.epoch`` is the epoch of the
            first ``iter()``; it counts on when the same function is passed again.
        options : InputOptions, optional
            Prefetching, and what happens to elements that fail.

        Returns
        -------
        DistributedDataset
            Where the last step has too few batches, the other replicas get empty ones; elements
            that are no batches and do not fill a step raise ``DatasetError``.

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

    # -- what they share ------------------------------------------------------------------------

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

    def _mirrored(self, nest: Any, devices: tuple[Device, ...]) -> Any:
        owner = self._placement if len(devices) == self._placement.num_local else None

        def one(array: Any) -> Mirrored[Any]:
            whole = array_memory.holding(array).read_only(array)
            copies = [array_memory.on_device(whole, device) for device in devices]
            return Mirrored(copies, devices=devices, owner=owner)

        return regroup.map_leaves(one, nest)

    def _check_fits(self, verb: str, value: DistributedValues[Any]) -> None:
        self._check_own(verb, value)
        is_variable = isinstance(value, Variable)  # may have a single copy for all replicas
        if len(value.values) != self._placement.num_local and not is_variable:
            self._refuse(verb, value, "")

    def _check_own(self, verb: str, value: DistributedValues[Any]) -> None:
        """Raise if another strategy made a value."""
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

    def _dealt(
        self, nest: Any, verb: str, *, variables: bool = False, of: int | None = None
    ) -> list[Any]:
        """Return one nest per replica, with each distributed value replaced by its component.

        ``of`` asks for one nest per copy of a variable instead, of which there are so many.
        """
        leaves, structure = regroup.flatten(nest)
        distributed = [
            isinstance(leaf, DistributedValues) and (variables or not isinstance(leaf, Variable))
            for leaf in leaves
        ]
        for leaf, apart in zip(leaves, distributed, strict=True):
            if apart and len(leaf.values) != of:
                self._check_fits(verb, leaf)
            elif apart:
                self._check_own(verb, leaf)

        def component(leaf: Any, rank: int) -> Any:
            return leaf.values[rank if len(leaf.values) > 1 else 0]

        return [
            regroup.unflatten(
                structure,
                [
                    component(leaf, rank) if apart else leaf
                    for leaf, apart in zip(leaves, distributed, strict=True)
                ],
            )
            for rank in range(self._placement.num_local if of is None else of)
        ]

    def _arrays(self, verb: str, leaf: Any) -> list[Any]:
        """Return a distributed value's components as arrays; refuse plain values."""
        if not isinstance(leaf, PerReplica | Mirrored | Variable):
            raise ValueError(
                f"{verb}: expected one value per replica (PerReplica, Mirrored or Variable), got a "
                f"plain {type(leaf).__name__}; it is the same on all replicas, so there is nothing "
                f"to {verb}"
            )
        self._check_fits(verb, leaf)
        values = leaf.values
        placement, seen = self._placement, self._placement.memory
        if len(values) < placement.num_local:
            values = values * placement.num_local
        numbered = enumerate(values, placement.first_replica)
        return [as_array(value, verb, replica, seen) for replica, value in numbered]


def _extents(shape: Any) -> tuple[int, ...]:
    """Return a shape as NumPy understands it."""
    extents = (shape,) if is_integer(shape) else shape
    if not isinstance(extents, (list, tuple)) or not all(is_integer(one) for one in extents):
        raise TypeError(f"empty: shape must be an integer or a list of them, got {shown(shape)}")
    if any(one < 0 for one in extents):
        raise ValueError(f"empty: lengths must not be negative, got shape {shown(shape)}")
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
    """The context manager that ``strategy.scope()`` returns; yields the strategy."""

    def __init__(self, strategy: Strategy, placement: Placement) -> None:
        self._strategy = strategy
        self._placement = placement
        self._entered: list[tuple[Frame, Token[Frame]]] = []

    def __enter__(self) -> Strategy:
        """Make the strategy the current one."""
        here = context.explicit()
        if here is not None and (here.replica is not None or here.placement is not self._placement):
            context.require_cross_replica(self._placement, "scope")
        merging = here is not None and here.merging
        frame = Frame(self._placement, self._strategy, merging=merging)
        self._entered.append((frame, context.enter(frame)))
        return self._strategy

    def __exit__(self, *_: object) -> None:
        """Make the strategy that was current before current again."""
        if not self._entered:
            raise ContextError(
                f"the scope of {self._placement.name} was left without having been entered; use it "
                f"in a with statement"
            )
        frame, token = self._entered[-1]
        if context.explicit() is not frame:
            raise ContextError(
                f"the scope of {self._placement.name} was left out of order; leave the inner scope "
                f"first (use with statements)"
            )
        self._entered.pop()
        context.leave(token)


def set_strategy(strategy: Strategy | None) -> None:
    """Make a strategy apply wherever no scope does, as if its scope were entered; None resets.

    Meant to be called once, at the start of a program. Inside a scope or a replica it raises
    ``ContextError``.
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


# Names that code written for tf.distribute uses for the same methods.
_OTHER_NAMES = {
    "experimental_distribute_dataset": "distribute_dataset",
    "experimental_local_results": "local_results",
    "experimental_distribute_values_from_function": "distribute_values_from_function",
}
for _other, _method in _OTHER_NAMES.items():
    setattr(Strategy, _other, getattr(Strategy, _method))
