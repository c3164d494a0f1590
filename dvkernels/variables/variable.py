"""The variable: state with one copy per replica, kept consistent by its modes."""

from __future__ import annotations

import operator
import weakref
from typing import Any, NoReturn, final

import numpy as np

from dvkernels import context, pytree, reduce_op
from dvkernels.devices import array_memory, registry
from dvkernels.devices.array_spec import Spec
from dvkernels.devices.device import Device
from dvkernels.errors import (
    ContextError,
    SynchronizationError,
)
from dvkernels.replicas.collective_call import CollectiveCall, Same
from dvkernels.user_errors import brief
from dvkernels.values.distributed import DistributedValues, PerReplica, is_integer
from dvkernels.values.placement import Placement
from dvkernels.variables import deep_copy, scatter
from dvkernels.variables.access import LONE_REPLICA, calling_replica
from dvkernels.variables.copies import Copies, Draft, commit_together
from dvkernels.variables.initial_value import initial_copies
from dvkernels.variables.operators import ArrayOperators
from dvkernels.variables.synchronization import (
    SYNC_MODES,
    VariableAggregation,
    VariableSynchronization,
)

__all__ = ["Variable", "sync"]


@final
class Variable(ArrayOperators, DistributedValues[Any]):
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
            copies = initial_copies(initial, dtype, when, how, name, placement)
            return new_variable(copies, bool(trainable), when, how)

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
        replica = calling_replica(self._copies, "read_value", write=False)
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
        replica = calling_replica(self._copies, "gather_rows", write=False)
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
        replica = calling_replica(self._copies, verb, write=True)
        mode = SYNC_MODES[self._synchronization]
        if replica is None:
            mode.write_across(self._copies, self._aggregation, verb, value)
        else:
            mode.write_in_replica(self._copies, self._aggregation, verb, value, replica)

    def _scatter(self, verb: str, indices: Any, updates: Any) -> None:
        replica = calling_replica(self._copies, verb, write=True)
        mode = SYNC_MODES[self._synchronization]
        arguments = (self._copies, self._aggregation, verb, indices, updates)
        if replica is None:
            mode.scatter_across(*arguments)
        else:
            mode.scatter_in_replica(*arguments, replica)

    def __copy__(self) -> NoReturn:
        raise TypeError(
            f"variable {self.name!r} has no shallow copy; take copy.deepcopy(v) or v.numpy()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Variable:
        """Return a new variable of the same strategy, modes and name, with the same copies.

        The copy is taken between two steps: a step that another thread runs is waited for.
        """
        if calling_replica(self._copies, "deepcopy", write=False) not in (None, LONE_REPLICA):
            raise ContextError(
                f"deepcopy of variable {self.name!r} in a replica: each replica would make one; "
                f"copy it outside of run or in merge_call"
            )
        made = deep_copy.between_steps(self._copies, self._duplicate)
        memo[id(self)] = made
        deep_copy.report(memo, self, made)
        return made

    def _duplicate(self) -> Variable:
        copies, when = self._copies, self._synchronization
        # One content for equal copies, even if another thread writes them meanwhile.
        are_equal = when is VariableSynchronization.ON_WRITE
        initial = copies.arrays[:1] if are_equal else copies.arrays
        duplicate = Copies(initial, copies.placement, copies.name)
        duplicate.is_slot = copies.is_slot
        return new_variable(duplicate, self._trainable, when, self._aggregation)

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


def new_variable(
    copies: Copies, trainable: bool, when: VariableSynchronization, how: VariableAggregation
) -> Variable:
    """Return a variable of these copies, listed in ``alive`` unless it is a draft."""
    variable = object.__new__(Variable)
    variable._copies = copies
    variable._synchronization = when
    variable._aggregation = how
    variable._trainable = trainable
    if not isinstance(copies, Draft):
        alive[id(variable)] = variable
    return variable


# By id, because variables compare elementwise and have no hash. For debug mode and memory reports.
alive: weakref.WeakValueDictionary[int, Variable] = weakref.WeakValueDictionary()


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
    listed: list[Variable] = pytree.leaves(variables)
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
    replica = calling_replica(listed[0]._copies, "sync", write=True)

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


def storage_of(variable: Variable) -> Copies:
    """Return the object that holds the copies of a variable, for the modules of this package."""
    return variable._copies
