"""The variable: state with one copy per replica, kept consistent by its modes."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, final

import numpy as np

from dvkernels import context, deadlines, reduce_op
from dvkernels.devices import array_memory, interop, registry
from dvkernels.devices.base import Device
from dvkernels.devices.buffers import Spec, refuse_masked
from dvkernels.errors import (
    BufferMismatchError,
    CollectiveTimeoutError,
    ContextError,
    NotABufferError,
    SynchronizationError,
)
from dvkernels.profiler import memory_report
from dvkernels.replica_context import ReplicaContext
from dvkernels.replicas.rendezvous import CollectiveCall, Rendezvous, Same
from dvkernels.user_errors import brief, text_of
from dvkernels.values import function_checks, regroup
from dvkernels.values.distributed import DistributedValues, PerReplica, is_integer
from dvkernels.values.placement import Placement
from dvkernels.variables import scatter
from dvkernels.variables.copies import Copies, Draft, commit_together
from dvkernels.variables.modes import (
    SYNC_MODES,
    VariableAggregation,
    VariableSynchronization,
    aggregated,
)

__all__ = ["Variable", "sync"]

_numbers = itertools.count()


@final
class Variable(DistributedValues[Any]):
    """State that all replicas read and write, kept consistent by its modes.

    Parameters
    ----------
    initial_value : array-like, or callable that returns one
        The first content: numbers or bool, of any shape. Copied. A callable is called once, so
        that all replicas start with the same value; over several workers, the first worker's
        value is taken.
    dtype : dtype, optional
        The dtype of the copies; that of ``initial_value`` if not given.
    trainable : bool, optional
        Whether optimizers should change it. If not given, True unless ``synchronization`` is
        ON_READ.
    synchronization : VariableSynchronization or str
        ``"on_write"`` (also ``"auto"``): the copies are always equal. ``"on_read"``: each replica
        writes its own copy, and a read in cross-replica context aggregates the copies.
        ``"none"``: each replica reads and writes its own copy.
    aggregation : VariableAggregation or str
        The reduction of the replicas' values to one: ``"sum"``, ``"mean"`` or
        ``"only_first_replica"``. With ``"none"``, operations that need one raise.
    name : str, optional
        Name in messages and checkpoints; ``"variable_<n>"`` if not given.

    Raises
    ------
    ValueError
        An unknown mode; MEAN of an integer variable; a mode that the strategy does not support.
    NotABufferError
        ``initial_value`` is not an array of numbers.
    BufferMismatchError
        ``dtype`` cannot hold the initial value.
    CollectiveMismatchError
        Inside ``run``: the replicas created different variables.

    Notes
    -----
    Inside ``strategy.scope()`` there is one copy per replica (one in all under central storage);
    outside every scope there is a single copy. Writes return None. After an error or an interrupt
    either all copies are written, or all are as before. NumPy functions, indexing and arithmetic
    act on :meth:`read_value`. ``==`` compares elementwise, so variables are not hashable.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    ...     with strategy.scope():
    ...         total = dv.Variable(0.0, aggregation="sum")
    ...     strategy.run(lambda: total.assign_add(1.0))
    ...     print(float(total))
    2.0
    """

    __slots__ = (
        "__weakref__",
        "_aggregation",
        "_copies",
        "_mode",
        "_synchronization",
        "_trainable",
    )
    __hash__ = None  # type: ignore[assignment]
    _copies: Copies
    _aggregation: VariableAggregation
    _synchronization: VariableSynchronization
    _trainable: bool

    # Everything is in __new__: inside run all replicas create one object together, and Python would
    # call __init__ on it once per replica.
    def __new__(
        cls,
        initial_value: Any,
        *,
        dtype: Any = None,
        trainable: bool | None = None,
        synchronization: VariableSynchronization | str = "auto",
        aggregation: VariableAggregation | str = "none",
        name: str | None = None,
    ) -> Variable:
        """Create the variable; inside ``run`` once, by all replicas together."""
        when = VariableSynchronization.of(synchronization)
        if when is VariableSynchronization.AUTO:
            when = VariableSynchronization.ON_WRITE
        how = VariableAggregation.of(aggregation)
        if name is not None and not isinstance(name, str):
            raise TypeError(f"a variable's name is a string, got {name!r}")
        if not isinstance(trainable, (bool, np.bool_, type(None))):
            raise TypeError(f"trainable is True, False or None, got {brief(trainable)}")
        if trainable is None:
            trainable = when is not VariableSynchronization.ON_READ
        frame = context.find()
        placement = context.UNSCOPED if frame is None else frame.placement

        def create(initial: Any) -> Variable:
            return _created(initial, dtype, bool(trainable), when, how, name, placement)

        if frame is None or frame.replica is None:
            return create(initial_value)
        terms = (name, str(dtype), trainable, when.value, how.value)

        def act(initial_values: list[Any]) -> list[Variable]:
            token = context.enter(context.Frame(placement, frame.strategy, merging=True))
            try:
                variable = create(initial_values[0])
            finally:
                context.leave(token)
            return [variable] * len(initial_values)

        created: Variable = frame.replica.meet(
            CollectiveCall("Variable", terms, initial_value, act)
        )
        return created

    # -- description ----------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each copy."""
        shape: tuple[int, ...] = self._copies.arrays[0].shape
        return shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of each copy."""
        dtype: np.dtype[Any] = self._copies.arrays[0].dtype
        return dtype

    @property
    def name(self) -> str:
        """The name given at creation, or a generated one."""
        return self._copies.name

    @property
    def trainable(self) -> bool:
        """Whether optimizers should change it."""
        return self._trainable

    @property
    def synchronization(self) -> VariableSynchronization:
        """When the copies are synchronized; AUTO has been resolved to ON_WRITE."""
        return self._synchronization

    @property
    def aggregation(self) -> VariableAggregation:
        """The reduction of the replicas' values to one value."""
        return self._aggregation

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the copies of this process, in replica order."""
        return self._copies.placement.copy_devices

    def on(self, replica_id: int) -> Any:
        """Return a read-only view of the copy that a replica reads.

        Parameters
        ----------
        replica_id : int
            The id of the replica, counted over all processes.

        Returns
        -------
        array of shape ``variable.shape``
            Valid until the next write.

        Raises
        ------
        IndexError
            There is no such replica, or another process holds its copy.
        """
        placement = self._copies.placement
        if placement.central_device is not None and is_integer(replica_id):
            replica_id = 0 if 0 <= replica_id < placement.num_replicas else replica_id
        return super().on(replica_id)

    @property
    def owner(self) -> Placement:
        """The placement of the strategy that created the variable."""
        return self._copies.placement

    @property
    def values(self) -> tuple[Any, ...]:
        """Read-only views of the copies of this process, in replica order."""
        return self._copies.views

    def copy_to(self, device: Device | str) -> PerReplica[Any]:
        """Copy every copy of this process to ``device``.

        Parameters
        ----------
        device : Device or str
            The target of all copies.

        Returns
        -------
        PerReplica of array of shape ``variable.shape``
            New arrays, one per copy; nothing is communicated or reduced.

        Raises
        ------
        DeviceError
            The device does not exist.
        """
        target = registry.resolve(device)
        copies = [array_memory.copied(array, target) for array in self._copies.arrays]
        return PerReplica(copies, devices=[target] * len(copies), owner=self.owner)

    # -- reads ----------------------------------------------------------------------------------

    def read_value(self) -> Any:
        """Return the value as a read-only view, valid until the next write.

        Returns
        -------
        array of shape ``variable.shape``, or PerReplica of such
            In replica context, the replica's own copy. In cross-replica context, the first copy
            (ON_WRITE), the aggregate of the copies (ON_READ), or a ``PerReplica`` of all copies
            (NONE).

        Raises
        ------
        SynchronizationError
            Cross-replica read of an ON_READ variable with aggregation NONE.
        ContextError
            Another strategy's scope or run is current.

        Notes
        -----
        Over several workers a cross-replica read of an ON_READ variable communicates, so every
        worker must make it.
        """
        replica = self._role("read_value", write=False)
        mode = SYNC_MODES[self._synchronization]
        if replica is None:
            return mode.read_across(self._copies, self._aggregation)
        return mode.read_in_replica(self._copies, self._aggregation, replica)

    def gather_rows(self, indices: Any) -> Any:
        """Return rows of the value as a new array.

        Parameters
        ----------
        indices : array-like of int, of any shape
            Positions along axis 0; repetitions are allowed. Negative indices raise.

        Returns
        -------
        array of shape ``indices.shape + variable.shape[1:]``
            Owned by the caller; a ``PerReplica`` of such arrays where :meth:`read_value` returns
            one.

        Raises
        ------
        IndexError
            An index is out of range.
        NotABufferError, BufferMismatchError
            The indices are not integers; the variable is 0-d.

        Examples
        --------
        >>> import dvkernels as dv
        >>> table = dv.Variable([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> table.gather_rows([2, 0])
        array([[5., 6.],
               [1., 2.]])
        """
        replica = self._role("gather_rows", write=False)
        if replica is not None:
            indices = replica.own(indices)
        number = None if replica is None else replica.replica_id_in_sync_group
        rows = scatter.checked_rows(self._copies, "gather_rows", indices, number)
        value = self.read_value()

        def take(array: Any) -> Any:
            return array[rows.reshape(-1)].reshape(*rows.shape, *self.shape[1:])

        apply = self._copies.memory.apply
        if isinstance(value, PerReplica):
            each = [apply(take, array) for array in value.values]
            return PerReplica(each, devices=value.devices, owner=value.owner)
        return apply(take, value)

    def numpy(self) -> Any:
        """Return the value as a NumPy array.

        Returns
        -------
        numpy.ndarray of shape ``variable.shape``
            New, owned by the caller. For a variable on a GPU this waits for the GPU.

        Raises
        ------
        TypeError
            A NONE variable of several replicas in cross-replica context: it has several values.
        """
        return np.array(self._on_host())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self._on_host(), dtype=dtype, copy=copy)

    def _single(self) -> Any:
        """Return the value; for a NONE variable of a single replica, its only copy."""
        value = self.read_value()
        if isinstance(value, PerReplica) and self.owner.num_replicas == 1:
            return value.at(0)
        return value

    def _on_host(self) -> Any:
        """Return the value in host memory; this waits for a GPU."""
        value = self._single()
        return value if isinstance(value, PerReplica) else self._copies.memory.to_host(value)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        # ``at`` writes its first operand.
        written = inputs[:1] if method == "at" else kwargs.get("out", ())
        for out in written:
            _refuse_to_write(out, f"the out of np.{ufunc.__name__}")
        return getattr(ufunc, method)(*map(_read, inputs), **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        target = given[0] if func in _NUMPY_WRITERS else kwargs.get("out")
        for out in target if isinstance(target, tuple) else (target,):
            _refuse_to_write(out, f"the output of np.{func.__name__}")
        # As NumPy does for objects that have __array__ but no __array_function__.
        return func._implementation(*args, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self.read_value()[_read(key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        _refuse_to_write(self, "v[...] = x", "v.scatter_update(rows, x) for some rows")

    def __len__(self) -> int:
        return len(self.read_value())

    def __iter__(self) -> Any:
        return iter(self.read_value())

    def __bool__(self) -> bool:
        return bool(self._single())

    def __float__(self) -> float:
        return float(self._single())

    def __int__(self) -> int:
        return int(self._single())

    def __index__(self) -> int:
        return operator.index(self._single())

    def __complex__(self) -> complex:
        return complex(self._single())

    # -- writes ---------------------------------------------------------------------------------

    def assign(self, value: Any) -> None:
        """Replace the content by ``value``.

        Parameters
        ----------
        value : array of this shape and dtype, or Python number for a 0-d variable
            In replica context the replica's value, or a distributed value that has one. In
            cross-replica context a value for all copies, or, for ON_READ and NONE, a
            ``PerReplica``.

        Raises
        ------
        BufferMismatchError, NotABufferError
            ``value`` does not have this shape and dtype.
        SynchronizationError
            ON_WRITE with aggregation NONE in one of several replicas; a ``PerReplica`` for an
            ON_WRITE variable; ``assign_add`` or ``assign_sub`` of an ON_READ variable with SUM in
            cross-replica context.
        ContextError
            Another strategy's scope or run is current, another thread runs a step of this
            strategy, or the variable was created outside every scope and a replica writes it.
        CollectiveMismatchError
            ON_WRITE in replica context: another replica did not make the same write.

        Notes
        -----
        In replica context:

        * ON_WRITE: the values of all replicas are aggregated, and every copy gets the result.
        * ON_READ and NONE: the replica's own copy gets its value.

        In cross-replica context every copy gets the value, except under ON_READ with SUM, where
        each copy gets a share and the shares add up to the value.

        After an error no copy has changed.

        Examples
        --------
        >>> import dvkernels as dv
        >>> rate = dv.Variable(0.1)
        >>> rate.assign(0.05)
        >>> float(rate)
        0.05
        """
        self._write("assign", value)

    def assign_add(self, value: Any) -> None:
        """Add ``value``. Parameters, errors and modes as for :meth:`assign`."""
        self._write("assign_add", value)

    def assign_sub(self, value: Any) -> None:
        """Subtract ``value``. Parameters, errors and modes as for :meth:`assign`."""
        self._write("assign_sub", value)

    def scatter_update(self, indices: Any, updates: Any) -> None:
        """Replace the rows ``indices`` by ``updates``; the last of several for one row wins.

        Parameters
        ----------
        indices : array-like of int, of any shape
            Positions along axis 0; repetitions are allowed. Negative indices raise.
        updates : array of shape ``indices.shape + variable.shape[1:]``, or a number
            Of this variable's dtype.

        Raises
        ------
        IndexError
            An index is out of range.
        SynchronizationError
            The variable is ON_READ; it is ON_WRITE with aggregation NONE and written in replica
            context; or ``scatter_update``, ``scatter_min`` or ``scatter_max`` under SUM or MEAN.
        BufferMismatchError, NotABufferError
            Shape or dtype of the updates do not fit; the indices are not integers; the variable is
            0-d.

        Notes
        -----
        In replica context, the copies of an ON_WRITE variable get the updates of all replicas
        (SUM), all of them divided by the number of replicas (MEAN), or those of replica 0
        (ONLY_FIRST_REPLICA); the replicas may pass different numbers of rows. A NONE variable
        changes in its own copy only. In cross-replica context all copies get the same updates.
        ``scatter_div`` of integers rounds down. After an error no copy has changed. The cost is
        proportional to the rows, not to the variable.

        Examples
        --------
        >>> import dvkernels as dv
        >>> table = dv.Variable([1.0, 2.0, 3.0])
        >>> table.scatter_add([0, 0, 2], [10.0, 10.0, 5.0])
        >>> table.numpy()
        array([21.,  2.,  8.])
        """
        self._scatter("scatter_update", indices, updates)

    def scatter_add(self, indices: Any, updates: Any) -> None:
        """Add ``updates`` to rows; several for one row accumulate. See :meth:`scatter_update`."""
        self._scatter("scatter_add", indices, updates)

    def scatter_sub(self, indices: Any, updates: Any) -> None:
        """Subtract ``updates`` from rows. See :meth:`scatter_update`."""
        self._scatter("scatter_sub", indices, updates)

    def scatter_mul(self, indices: Any, updates: Any) -> None:
        """Multiply rows by ``updates``, elementwise. See :meth:`scatter_update`."""
        self._scatter("scatter_mul", indices, updates)

    def scatter_div(self, indices: Any, updates: Any) -> None:
        """Divide rows by ``updates``, elementwise. See :meth:`scatter_update`."""
        self._scatter("scatter_div", indices, updates)

    def scatter_min(self, indices: Any, updates: Any) -> None:
        """Replace rows by the elementwise minimum with ``updates``. See :meth:`scatter_update`."""
        self._scatter("scatter_min", indices, updates)

    def scatter_max(self, indices: Any, updates: Any) -> None:
        """Replace rows by the elementwise maximum with ``updates``. See :meth:`scatter_update`."""
        self._scatter("scatter_max", indices, updates)

    def sync(self, op: reduce_op.Reduction | str = "mean") -> None:
        """Synchronize a NONE variable: every copy gets the reduction of all copies.

        Parameters
        ----------
        op : ReduceOp, CustomReduction or str
            The reduction, or its name.

        Raises
        ------
        SynchronizationError
            The variable is not a NONE variable. Other modes synchronize by themselves.

        Notes
        -----
        In replica context all replicas must call it. :func:`sync` synchronizes several variables
        in one collective, and lists further errors.
        """
        sync([self], op)

    def _write(self, verb: str, value: Any) -> None:
        replica = self._role(verb, write=True)
        mode = SYNC_MODES[self._synchronization]
        if replica is None:
            mode.write_across(self._copies, self._aggregation, verb, value)
        else:
            mode.write_in_replica(self._copies, self._aggregation, verb, value, replica)

    def _scatter(self, verb: str, indices: Any, updates: Any) -> None:
        replica = self._role(verb, write=True)
        mode = SYNC_MODES[self._synchronization]
        arguments = (self._copies, self._aggregation, verb, indices, updates)
        if replica is None:
            mode.scatter_across(*arguments)
        else:
            mode.scatter_in_replica(*arguments, replica)

    def _role(self, verb: str, *, write: bool) -> ReplicaContext | None:
        """Return the calling replica, None in cross-replica context; raise if access is refused."""
        placement = self._copies.placement
        frame = context.find()
        if frame is None and placement.is_of(context.UNSCOPED):
            return _LONE_REPLICA
        if frame is None or context.is_outside(frame) or placement.is_of(frame.placement):
            replica = None if frame is None else frame.replica
            if write and replica is None:
                context.check_no_step_elsewhere(
                    placement.parent or placement, f"{verb} of variable {self.name!r}"
                )
            return replica
        if not placement.is_of(context.UNSCOPED):
            raise ContextError(
                f"{verb} of variable {self.name!r}: it belongs to {placement.name}, and this runs "
                f"under {frame.placement.name}; leave that strategy's scope first"
            )
        if write and frame.replica is not None:
            raise ContextError(
                f"{verb} of variable {self.name!r} in a replica of {frame.placement.name}: it was "
                f"created outside every scope, so all replicas would write the same copy; create "
                f"it inside strategy.scope()"
            )
        return _LONE_REPLICA

    def __copy__(self) -> NoReturn:
        raise TypeError(
            f"variable {self.name!r} has no shallow copy; take copy.deepcopy(v) or v.numpy()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Variable:
        """Return a new variable of the same strategy, modes and name, with the same copies.

        The copy is taken between two steps: a step that another thread runs is waited for.
        """
        if self._role("deepcopy", write=False) not in (None, _LONE_REPLICA):
            raise ContextError(
                f"deepcopy of variable {self.name!r} in a replica: each replica would make one; "
                f"copy it outside of run or in merge_call"
            )
        placement, seconds = self._copies.placement, deadlines.timeout_seconds()
        frame = context.find()
        if placement is context.UNSCOPED or (frame is not None and frame.merging):
            made = self._duplicate()  # a single copy; or inside a step, which holds the lock
        else:
            lock = placement.step_lock.lock()
            try:
                if not lock.acquire(timeout=seconds):
                    raise CollectiveTimeoutError(
                        f"deepcopy of variable {self.name!r}: another thread has been running a "
                        f"step of its strategy for {seconds:g} s; a thread that this step waits "
                        f"for must not copy (DVKERNELS_TIMEOUT_SECONDS changes the timeout)"
                    )
                made = self._duplicate()
            finally:
                try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                    lock.release()
                except RuntimeError:  # not acquired: the wait timed out or was interrupted
                    pass
        memo[id(self)] = made
        for callback in memo.get(id(_DEEPCOPY_CALLBACKS), ()):
            callback(self, made)
        return made

    def _duplicate(self) -> Variable:
        copies, when = self._copies, self._synchronization
        # One content for equal copies, even if another thread writes them meanwhile.
        are_equal = when is VariableSynchronization.ON_WRITE
        initial = copies.arrays[:1] if are_equal else copies.arrays
        duplicate = Copies(initial, copies.placement, copies.name)
        duplicate.is_slot = copies.is_slot
        return _new_variable(duplicate, self._trainable, when, self._aggregation)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"variable {self.name!r} cannot be pickled: its copies belong to a strategy of this "
            f"process; pass on v.numpy(), or save it with dv.Checkpoint"
        )

    def __repr__(self) -> str:
        return (
            f"<Variable {self.name!r} {Spec(self.shape, self.dtype)} "
            f"{self._synchronization.value}/{self._aggregation.value} on "
            f"{', '.join(str(device) for device in self.devices)}>"
        )


# The replica context of code outside every scope, for variables created outside every scope.
_LONE_REPLICA = ReplicaContext(context.UNSCOPED, Rendezvous(1), 0, None)


def _created(
    initial: Any,
    dtype: Any,
    trainable: bool,
    when: VariableSynchronization,
    how: VariableAggregation,
    name: str | None,
    placement: Placement,
) -> Variable:
    label = f"variable_{next(_numbers)}" if name is None else name
    if callable(initial):
        function_checks.check(f"variable {label!r}: initial_value", initial)
    content = initial() if callable(initial) else initial
    value = _read(content)
    refuse_masked(value, f"variable {label!r}: the initial value")
    if interop.is_foreign(value):
        value = placement.memory.view(f"variable {label!r}", value, "the initial value")
    try:
        array = value if interop.is_on_gpu(value) else np.asarray(value)
        wanted = array.dtype if dtype is None else np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise NotABufferError(
            f"variable {label!r}: the initial value {brief(content, 60)} is not an array: "
            f"{text_of(error)}"
        ) from error
    if reduce_op.kind(array.dtype) in "biufc" and not (array.dtype == wanted and wanted.isnative):
        array = _cast(array, wanted, label)
    if reduce_op.kind(array.dtype) not in "biufc":
        raise NotABufferError(
            f"variable {label!r}: expected numbers, the initial value is of dtype {array.dtype}"
        )
    if how is VariableAggregation.MEAN and array.dtype.kind in "biu":
        raise SynchronizationError(
            f"variable {label!r}: the mean of {array.dtype} values is not a {array.dtype}; use "
            f"aggregation 'sum' or 'only_first_replica', or a floating-point dtype"
        )
    if placement.central_device is not None and when is not VariableSynchronization.ON_WRITE:
        raise SynchronizationError(
            f"variable {label!r}: synchronization={when.value!r} needs one copy per replica, and "
            f"{placement.name} keeps a single one on {placement.central_device}; use 'on_write'"
        )
    array = placement.broadcast_from_chief(array)
    return _new_variable(Copies([array], placement, label), trainable, when, how)


def _cast(array: Any, dtype: np.dtype[Any], label: str) -> Any:
    """Cast an array; raise if an integer would change, or the imaginary part be dropped."""
    into = reduce_op.kind(dtype)
    if into not in "biufc":
        raise NotABufferError(f"variable {label!r}: expected a dtype of numbers, got {dtype}")
    if not dtype.isnative:  # kernels compute in native byte order only
        dtype = dtype.newbyteorder("=")
    is_kept = reduce_op.kind(array.dtype) != "c" or into == "c"
    cast = None
    if is_kept:
        with np.errstate(invalid="ignore"):  # the comparison below finds a NaN cast to an integer
            cast = array.astype(dtype)
        is_kept = into in "fc" or bool((cast == array).all())
    if not is_kept:
        raise BufferMismatchError(
            f"variable {label!r}: {dtype} cannot hold the initial value, "
            f"{Spec(array.shape, array.dtype)}: numbers would be cut off; round or cast it first, "
            f"if that is intended"
        )
    return cast


def _new_variable(
    copies: Copies, trainable: bool, when: VariableSynchronization, how: VariableAggregation
) -> Variable:
    variable = object.__new__(Variable)
    variable._copies = copies
    variable._synchronization = when
    variable._aggregation = how
    variable._trainable = trainable
    if not isinstance(copies, Draft):
        _alive[id(variable)] = variable
    return variable


# By id, because variables compare elementwise and have no hash. For debug mode and memory reports.
_alive: weakref.WeakValueDictionary[int, Variable] = weakref.WeakValueDictionary()


def variables_of(placement: Placement) -> list[Variable]:
    """Return the variables of a strategy that are still alive."""
    return [variable for variable in list(_alive.values()) if variable.owner is placement]


def _memory_usage() -> Iterator[tuple[str, str, int]]:
    for variable in list(_alive.values()):
        copies = variable._copies
        owner = "slots" if copies.is_slot else "variables"
        for device, array in zip(variable.devices, copies.arrays, strict=True):
            yield str(device), owner, array.nbytes
        if copies.has_scratch:
            yield str(variable.devices[0]), "workspaces", copies.arrays[0].nbytes


memory_report.register_account(_memory_usage)


def variable_like(variable: Variable, name: str, content: Any = None) -> Variable:
    """Return an optimizer slot: a variable of the same shape, dtype and devices, zeros at first.

    It is not trainable, and is written in cross-replica context only.
    """
    made = _created(
        np.zeros(variable.shape, variable.dtype) if content is None else content,
        None,
        False,
        VariableSynchronization.ON_WRITE,
        VariableAggregation.NONE,
        f"{variable.name}/{name}",
        variable.owner,
    )
    made._copies.is_slot = True
    return made


_DEEPCOPY_CALLBACKS = object()  # its id is the key of the callbacks in the memo of a deep copy
DeepcopyCallback = Callable[[Variable, Variable], None]


def on_deepcopy(memo: dict[int, Any], callback: DeepcopyCallback) -> None:
    """Register ``callback(variable, copy)`` for each variable that this deep copy still copies."""
    memo.setdefault(id(_DEEPCOPY_CALLBACKS), []).append(callback)


def drafts_of(variable: Variable) -> list[Variable]:
    """Return one draft variable per copy; its writes take effect by :func:`commit_drafts`."""
    copies = variable._copies
    ranks = range(len(copies.arrays))
    return [
        _new_variable(
            Draft(copies, rank),
            variable.trainable,
            VariableSynchronization.ON_WRITE,
            VariableAggregation.NONE,
        )
        for rank in ranks
    ]


def commit_drafts(variable: Variable, drafts: Sequence[Variable]) -> None:
    """Write the contents of the drafts to the copies, all together."""
    drafted = [draft._copies for draft in drafts]
    if any(isinstance(copies, Draft) and copies.is_written for copies in drafted):
        variable._copies.commit([copies.arrays[0] for copies in drafted])


def end_drafts(drafts: Sequence[Variable]) -> None:
    """End the drafts: later writes to them raise."""
    for draft in drafts:
        assert isinstance(draft._copies, Draft)
        draft._copies.has_ended = True


def sync(variables: Any, op: reduce_op.Reduction | str = "mean") -> None:
    """Synchronize NONE variables: every copy gets the reduction of all copies.

    Parameters
    ----------
    variables : Variable, or a pytree of them
        All of one strategy, with ``synchronization="none"``.
    op : ReduceOp, CustomReduction or str
        The reduction, or its name; it must support the dtype of each variable.

    Raises
    ------
    TypeError
        A leaf is not a variable.
    SynchronizationError
        A variable has another synchronization; it synchronizes by itself.
    ContextError
        The variables belong to several strategies, or another strategy is current.
    UnsupportedDTypeError
        ``op`` does not support the dtype of a variable.
    CollectiveMismatchError
        In replica context: the replicas did not all call it with the same variables.

    Notes
    -----
    In replica context this is one collective for all variables. After an error no variable has
    changed.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    ...     with strategy.scope():
    ...         weight = dv.Variable(0.0, synchronization="none")
    ...     weight.assign(dv.PerReplica([1.0, 3.0]))
    ...     dv.sync([weight])
    ...     print([float(copy) for copy in weight.values])
    [2.0, 2.0]
    """
    reduction = reduce_op.parse(op)
    listed: list[Variable] = regroup.flatten(variables)[0]
    for variable in listed:
        if not isinstance(variable, Variable):
            raise TypeError(f"sync needs variables; got {brief(variable)}")
        if variable.synchronization is not VariableSynchronization.NONE:
            raise SynchronizationError(
                f"sync of variable {variable.name!r}: it is {variable.synchronization.name}, which "
                f"synchronizes by itself; sync is for synchronization='none'"
            )
        if variable.owner is not listed[0].owner:
            raise ContextError(
                f"sync: variable {variable.name!r} belongs to {variable.owner.name}, "
                f"{listed[0].name!r} to {listed[0].owner.name}; sync them apart"
            )
        reduce_op.check_dtype(f"sync of variable {variable.name!r}", reduction, variable.dtype)
    if not listed:
        return
    replica = listed[0]._role("sync", write=True)

    def act(payloads: list[Any]) -> list[None]:
        writes = []
        for copies in (variable._copies for variable in listed):
            reduced = copies.placement.communicator.reduce(list(copies.arrays), reduction)
            writes.append((copies, [reduced] * len(copies.arrays)))
        commit_together(writes)
        return [None] * len(payloads)

    if replica is None:
        act([])
        return
    terms = (reduction.value, *(t for v in listed for t in (v.name, Same(id(v)))))
    replica.meet(CollectiveCall("sync", terms, None, act))


def copies_of(variable: Variable) -> tuple[Any, ...]:
    """Return the writable arrays of the copies, for kernels that write all of them in one call."""
    return variable._copies.arrays


class SavedVariable(NamedTuple):
    """Arrays that a checkpoint saves of a variable: ``total`` in all, some of this process.

    Attributes
    ----------
    arrays : tuple of array
        The arrays of this process; they may be the copies themselves.
    first : int
        The index of the first of them among the ``total`` arrays of all processes.
    total : int
        1 if the copies are equal or have an aggregate, which every process then holds; else the
        number of replicas.
    """

    arrays: tuple[Any, ...]
    first: int = 0
    total: int = 1


def saved_by(variable: Variable) -> SavedVariable:
    """Return the arrays that a checkpoint saves of a variable.

    Every worker must call this, because an aggregate is computed over all workers.
    """
    copies, how = variable._copies, variable._aggregation
    match variable._synchronization:
        case VariableSynchronization.ON_WRITE:
            return SavedVariable(copies.arrays[:1])
        case VariableSynchronization.ON_READ if how is not VariableAggregation.NONE:
            return SavedVariable((aggregated(copies, how, list(copies.arrays)),))
        case _:
            placement = copies.placement
            return SavedVariable(copies.arrays, placement.first_replica, placement.num_replicas)


def assign_first_copy(variable: Variable) -> None:
    """Assign the first copy's content in cross-replica context, after all copies got one value."""
    mode = SYNC_MODES[variable._synchronization]
    mode.write_across(variable._copies, variable._aggregation, "assign", copies_of(variable)[0])


def _read(value: Any) -> Any:
    return value.read_value() if isinstance(value, Variable) else value


# The signs of the operators that have an in-place form, such as +=.
_SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "matmul": "@", "lshift": "<<", "rshift": ">>", "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
# The NumPy functions that write their first argument.
_NUMPY_WRITERS = {
    np.copyto, np.put, np.place, np.putmask, np.put_along_axis, np.fill_diagonal,
}  # fmt: skip


def _refuse_to_write(out: Any, what: str, remedy: str = "") -> None:
    """Raise if ``out`` is a variable: NumPy would write one copy and bypass the modes."""
    if isinstance(out, Variable):
        calls = ["v.assign(x)", "v.assign_add(x)", "v.assign_sub(x)", *filter(None, [remedy])]
        raise TypeError(
            f"variable {out.name!r} is written by its methods, which keep the copies of all "
            f"replicas consistent, not by {what}; use {', '.join(calls[:-1])} or {calls[-1]}"
        )


def _install_operators() -> None:
    """Install NumPy's operators: each acts on ``read_value()``, in-place forms raise."""

    def binary(fn: Callable[[Any, Any], Any], name: str) -> None:
        def forward(self: Variable, other: Any) -> Any:
            return fn(self.read_value(), _read(other))

        def backward(self: Variable, other: Any) -> Any:
            return fn(other, self.read_value())

        setattr(Variable, f"__{name}__", forward)
        if name in ("lt", "le", "gt", "ge", "eq", "ne"):
            return
        setattr(Variable, f"__r{name}__", backward)

        # Without it Python would run ``v = v + x`` for ``v += x`` and bind the name to an array.
        def in_place(self: Variable, other: Any) -> Any:
            remedy = "" if name in ("add", "sub") else f"v.assign(v {sign} x)"
            _refuse_to_write(self, f"v {sign}= x", remedy)

        sign = _SIGNS.get(name)
        if sign is not None:
            setattr(Variable, f"__i{name}__", in_place)

    for name in (*_SIGNS, "lt", "le", "gt", "ge", "eq", "ne"):
        function = f"{name}_" if name in ("and", "or") else name
        binary(getattr(operator, function), name)
    binary(divmod, "divmod")

    def unary(fn: Callable[[Any], Any]) -> Callable[[Variable], Any]:
        return lambda self: fn(self.read_value())

    for name, fn in (
        ("neg", operator.neg),
        ("pos", operator.pos),
        ("abs", operator.abs),
        ("invert", operator.invert),
    ):
        setattr(Variable, f"__{name}__", unary(fn))


_install_operators()
