"""A variable: one name for copies that are kept in step the way its modes say."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, final

import numpy as np

from dvkernels import context, deadlines, reduce_op
from dvkernels.context import ReplicaContext
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
from dvkernels.replicas.rendezvous import CollectiveCall, Rendezvous, Same
from dvkernels.user_errors import shown, text_of
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
    """State that every replica reads and writes, kept in step by its modes.

    Parameters
    ----------
    initial_value : array-like, or callable that returns one
        Called once, so that all replicas start alike. Copied. Over several workers all start
        with the first worker's.
    dtype : dtype, optional
        Of the copies; that of ``initial_value`` if not given.
    trainable : bool, optional
        True unless ``synchronization`` is ON_READ.
    synchronization : VariableSynchronization or str
        ``"on_write"`` (also ``"auto"``): copies always equal. ``"on_read"``: each replica writes
        its own, a read in cross-replica context aggregates. ``"none"``: each replica its own.
    aggregation : VariableAggregation or str
        How the replicas' values become one: ``"sum"``, ``"mean"``, ``"only_first_replica"``;
        ``"none"`` forbids what would need it.
    name : str, optional
        For messages and checkpoints.

    Raises
    ------
    ValueError
        A wrong name of a mode; MEAN of an integer variable.
    NotABufferError
        ``initial_value`` is not an array of numbers.

    Notes
    -----
    Inside ``strategy.scope()`` there is one copy per replica; outside every scope a single one.
    Writes return None and leave all copies written, or, on an error or interrupt, all as they
    were. ``==`` compares elementwise, so variables are not hashable.

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

    # All is done in __new__: inside run the replicas together create one object, and __init__
    # would run on it once for each of them.
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
        """Create the variable, once for all replicas."""
        when = VariableSynchronization.of(synchronization)
        if when is VariableSynchronization.AUTO:
            when = VariableSynchronization.ON_WRITE
        how = VariableAggregation.of(aggregation)
        if name is not None and not isinstance(name, str):
            raise TypeError(f"a variable's name is a string, got {name!r}")
        if not isinstance(trainable, (bool, np.bool_, type(None))):
            raise TypeError(f"trainable is True, False or None, got {shown(trainable)}")
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

    # -- what it is -----------------------------------------------------------------------------

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
        """The name given, or one made up."""
        return self._copies.name

    @property
    def trainable(self) -> bool:
        """Whether optimizers should change it."""
        return self._trainable

    @property
    def synchronization(self) -> VariableSynchronization:
        """When the copies are brought together; AUTO has been resolved."""
        return self._synchronization

    @property
    def aggregation(self) -> VariableAggregation:
        """How the replicas' values become one."""
        return self._aggregation

    @property
    def devices(self) -> tuple[Device, ...]:
        """Where the copies live."""
        return self._copies.placement.copy_devices

    def on(self, replica_id: int) -> Any:
        """Return a read-only view of the copy that a replica reads."""
        whole = self._copies.placement
        if whole.central_device is not None and is_integer(replica_id):
            replica_id = 0 if 0 <= replica_id < whole.num_replicas else replica_id
        return super().on(replica_id)

    @property
    def owner(self) -> Placement:
        """The placement of the strategy that created it."""
        return self._copies.placement

    @property
    def values(self) -> tuple[Any, ...]:
        """Read-only views of the copies, in replica order."""
        return self._copies.views

    def copy_to(self, device: Device | str) -> PerReplica[Any]:
        """Return the copies' content as new arrays on ``device``, one for each copy."""
        target = registry.resolve(device)
        copies = [array_memory.copied(array, target) for array in self._copies.arrays]
        return PerReplica(copies, devices=[target] * len(copies), owner=self.owner)

    # -- reads ----------------------------------------------------------------------------------

    def read_value(self) -> Any:
        """Return the value as a read-only view, valid until the next write.

        In a replica its own copy. In cross-replica context the first copy (ON_WRITE), the
        aggregate (ON_READ; aggregation NONE raises ``SynchronizationError``), or a ``PerReplica``
        of all copies (NONE).
        """
        replica = self._role("read_value", write=False)
        mode = SYNC_MODES[self._synchronization]
        if replica is None:
            return mode.read_across(self._copies, self._aggregation)
        return mode.read_in_replica(self._copies, self._aggregation, replica)

    def gather_rows(self, indices: Any) -> Any:
        """Return rows of what :meth:`read_value` returns, as a new array.

        Parameters
        ----------
        indices : array-like of int
            Rows: positions along axis 0, as often as they are wanted. Negative ones do not count
            from the end.

        Returns
        -------
        array of shape ``indices.shape + variable.shape[1:]``
            Owned by the caller; a ``PerReplica`` of such where ``read_value`` is one.

        Raises
        ------
        IndexError
            There is no such row.
        NotABufferError, BufferMismatchError
            Indices that are not integers; a variable without axes.
        """
        replica = self._role("gather_rows", write=False)
        if replica is not None:
            indices = replica.own(indices)
        number = None if replica is None else replica.replica_id_in_sync_group
        rows = scatter.checked_rows(self._copies, "gather_rows", indices, number)
        value = self.read_value()

        def taken(array: Any) -> Any:
            return array[rows.reshape(-1)].reshape(*rows.shape, *self.shape[1:])

        apply = self._copies.memory.apply
        if isinstance(value, PerReplica):
            each = [apply(taken, array) for array in value.values]
            return PerReplica(each, devices=value.devices, owner=value.owner)
        return apply(taken, value)

    def numpy(self) -> Any:
        """Return the value as a NumPy array that the caller owns."""
        return np.array(self._on_host())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self._on_host(), dtype=dtype, copy=copy)

    def _single(self) -> Any:
        """Return the value for who needs one: of one replica's NONE variable, that copy."""
        value = self.read_value()
        if isinstance(value, PerReplica) and self.owner.num_replicas == 1:
            return value.at(0)
        return value

    def _on_host(self) -> Any:
        """Return the value in the memory of the host, which waits for a GPU."""
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
            _refuse_to_write(out, f"what np.{func.__name__} writes")
        # What NumPy does with what offers __array__, and has no such method.
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
        """Replace the content, as the modes say. ``value`` must have this shape and dtype."""
        self._write("assign", value)

    def assign_add(self, value: Any) -> None:
        """Add ``value``, as the modes say."""
        self._write("assign_add", value)

    def assign_sub(self, value: Any) -> None:
        """Subtract ``value``, as the modes say."""
        self._write("assign_sub", value)

    def scatter_update(self, indices: Any, updates: Any) -> None:
        """Replace rows ``indices`` by ``updates``; of several for one row the last stays.

        Parameters
        ----------
        indices : array-like of int
            Rows: positions along axis 0. Negative ones do not count from the end.
        updates : array of shape ``indices.shape + variable.shape[1:]``, or a number
            Of this dtype.

        Raises
        ------
        IndexError
            An index is out of range.
        SynchronizationError
            An ON_READ variable. In a replica without aggregation. ``scatter_update``,
            ``scatter_min`` and ``scatter_max`` under SUM or MEAN of several replicas.
        BufferMismatchError, NotABufferError
            Shapes, dtypes or indices that do not fit.

        Notes
        -----
        In a replica, under ON_WRITE, every copy gets the updates of all replicas (SUM), all of
        them divided by the number of replicas (MEAN), or those of replica 0; how many rows each
        replica names is its own affair. A NONE variable changes its own copy only. In
        cross-replica context all copies change alike. Integers are floor-divided. After an error
        all copies are as before. The cost is that of the rows, not of the variable.

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
        """Add ``updates`` to rows; several for one row add up. See :meth:`scatter_update`."""
        self._scatter("scatter_add", indices, updates)

    def scatter_sub(self, indices: Any, updates: Any) -> None:
        """Subtract ``updates`` from rows. See :meth:`scatter_update`."""
        self._scatter("scatter_sub", indices, updates)

    def scatter_mul(self, indices: Any, updates: Any) -> None:
        """Multiply rows by ``updates``. See :meth:`scatter_update`."""
        self._scatter("scatter_mul", indices, updates)

    def scatter_div(self, indices: Any, updates: Any) -> None:
        """Divide rows by ``updates``. See :meth:`scatter_update`."""
        self._scatter("scatter_div", indices, updates)

    def scatter_min(self, indices: Any, updates: Any) -> None:
        """Replace elements by the smaller of them and ``updates``. See :meth:`scatter_update`."""
        self._scatter("scatter_min", indices, updates)

    def scatter_max(self, indices: Any, updates: Any) -> None:
        """Replace elements by the larger of them and ``updates``. See :meth:`scatter_update`."""
        self._scatter("scatter_max", indices, updates)

    def sync(self, op: reduce_op.Reduction | str = "mean") -> None:
        """Bring the copies of a NONE variable together: every copy gets their reduction.

        In a replica, all replicas must call it. Other modes raise ``SynchronizationError``: they
        are brought together by themselves. See :func:`sync` for several variables at once.
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
        given = (self._copies, self._aggregation, verb, indices, updates)
        if replica is None:
            mode.scatter_across(*given)
        else:
            mode.scatter_in_replica(*given, replica)

    def _role(self, verb: str, *, write: bool) -> ReplicaContext | None:
        """Return the replica that acts here, None for cross-replica context."""
        placement = self._copies.placement
        frame = context.find()
        if frame is None and placement.is_of(context.UNSCOPED):
            return _LONE_REPLICA
        if frame is None or context.is_outside(frame) or placement.is_of(frame.placement):
            replica = None if frame is None else frame.replica
            if write and replica is None:
                context.check_turn(
                    placement.whole or placement, f"{verb} of variable {self.name!r}"
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
        """Return another variable of the same strategy, modes, name and content of each copy.

        A step that another thread runs is waited for: its copies are those between two steps.
        """
        if self._role("deepcopy", write=False) not in (None, _LONE_REPLICA):
            raise ContextError(
                f"deepcopy of variable {self.name!r} in a replica: each would make its own; copy "
                f"it outside of run or in merge_call"
            )
        placement, seconds = self._copies.placement, deadlines.timeout_seconds()
        frame = context.find()
        if placement is context.UNSCOPED or (frame is not None and frame.merging):
            made = self._twin()  # one copy; or inside a step, which has the turn
        else:
            turn = placement.turn.lock()
            try:
                if not turn.acquire(timeout=seconds):
                    raise CollectiveTimeoutError(
                        f"deepcopy of variable {self.name!r}: another thread has been running a "
                        f"step of its strategy for {seconds:g} s; one that this step waits for "
                        f"must not copy (DVKERNELS_TIMEOUT_SECONDS changes the patience)"
                    )
                made = self._twin()
            finally:
                try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                    turn.release()
                except RuntimeError:  # not ours: the wait was in vain or was interrupted
                    pass
        memo[id(self)] = made
        for follow in memo.get(id(_FOLLOWERS), ()):
            follow(self, made)
        return made

    def _twin(self) -> Variable:
        copies, when = self._copies, self._synchronization
        # Copies that are equal have one content, whoever writes them meanwhile.
        are_equal = when is VariableSynchronization.ON_WRITE
        initial = copies.arrays[:1] if are_equal else copies.arrays
        held = Copies(initial, copies.placement, copies.name)
        held.is_slot = copies.is_slot
        return _made(held, self._trainable, when, self._aggregation)

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


# The role of code outside every scope towards a variable that no scope created.
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
    held = _read(content)
    refuse_masked(held, f"variable {label!r}: the initial value")
    if interop.is_foreign(held):
        held = placement.memory.view(f"variable {label!r}", held, "the initial value")
    try:
        array = held if interop.is_on_gpu(held) else np.asarray(held)
        wanted = array.dtype if dtype is None else np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise NotABufferError(
            f"variable {label!r}: the initial value {shown(content, 60)} is not an array: "
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
    array = placement.of_chief(array)
    return _made(Copies([array], placement, label), trainable, when, how)


def _cast(array: Any, dtype: np.dtype[Any], label: str) -> Any:
    """Return numbers in another dtype; raise where integers or real numbers would be others."""
    into = reduce_op.kind(dtype)
    if into not in "biufc":
        raise NotABufferError(f"variable {label!r}: expected a dtype of numbers, got {dtype}")
    if not dtype.isnative:  # which no kernel computes with
        dtype = dtype.newbyteorder("=")
    is_kept = reduce_op.kind(array.dtype) != "c" or into == "c"
    cast = None
    if is_kept:
        with np.errstate(invalid="ignore"):  # NaN as an integer is found below
            cast = array.astype(dtype)
        is_kept = into in "fc" or bool((cast == array).all())
    if not is_kept:
        raise BufferMismatchError(
            f"variable {label!r}: {dtype} cannot hold the initial value, "
            f"{Spec(array.shape, array.dtype)}: numbers would be cut off; round or cast it first, "
            f"if that is meant"
        )
    return cast


def _made(
    copies: Copies, trainable: bool, when: VariableSynchronization, how: VariableAggregation
) -> Variable:
    variable = object.__new__(Variable)
    variable._copies = copies
    variable._synchronization = when
    variable._aggregation = how
    variable._trainable = trainable
    if not isinstance(copies, Draft):
        _living[id(variable)] = variable
    return variable


# By identity: a variable compares elementwise. For debug mode, and for the account of memory.
_living: weakref.WeakValueDictionary[int, Variable] = weakref.WeakValueDictionary()


def living_in(placement: Placement) -> list[Variable]:
    """Return the variables of a strategy that exist."""
    return [variable for variable in list(_living.values()) if variable.owner is placement]


def _account() -> Iterator[tuple[str, str, int]]:
    for variable in list(_living.values()):
        copies = variable._copies
        owner = "slots" if copies.is_slot else "variables"
        for device, array in zip(variable.devices, copies.arrays, strict=True):
            yield str(device), owner, array.nbytes
        if copies.has_scratch:
            yield str(variable.devices[0]), "workspaces", copies.arrays[0].nbytes


memory_report.open_account(_account)


def companion(variable: Variable, name: str, content: Any = None) -> Variable:
    """Return a variable that lives like another: its shape, dtype and copies; zeros at first.

    It is written in cross-replica context only, and is not trainable.
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


_FOLLOWERS = object()  # stands for those who follow a deep copy, in its memo
Follower = Callable[[Variable, Variable], None]


def on_copy(memo: dict[int, Any], follow: Follower) -> None:
    """Have ``follow(variable, copy)`` called for each variable that is yet copied in this go."""
    memo.setdefault(id(_FOLLOWERS), []).append(follow)


def drafts_of(variable: Variable) -> list[Variable]:
    """Return a variable for each copy, whose writes wait for :func:`commit`."""
    copies = variable._copies
    ranks = range(len(copies.arrays))
    return [
        _made(
            Draft(copies, rank),
            variable.trainable,
            VariableSynchronization.ON_WRITE,
            VariableAggregation.NONE,
        )
        for rank in ranks
    ]


def commit(variable: Variable, drafts: Sequence[Variable]) -> None:
    """Write what the drafts hold into the copies."""
    held = [draft._copies for draft in drafts]
    if any(isinstance(copies, Draft) and copies.is_written for copies in held):
        variable._copies.commit([copies.arrays[0] for copies in held])


def end(drafts: Sequence[Variable]) -> None:
    """Refuse what may still be written to the drafts."""
    for draft in drafts:
        assert isinstance(draft._copies, Draft)
        draft._copies.has_ended = True


def sync(variables: Any, op: reduce_op.Reduction | str = "mean") -> None:
    """Bring the copies of NONE variables together: every copy gets their reduction.

    Parameters
    ----------
    variables : Variable, or a nest of them
        All of one strategy, ``synchronization="none"``.
    op : ReduceOp or str

    Raises
    ------
    SynchronizationError
        A variable of another synchronization: it is brought together by itself.
    ContextError
        Variables of several strategies.
    CollectiveMismatchError
        In a replica: all replicas must call it with the same variables.

    Notes
    -----
    In a replica this is one meeting for all variables. After an error none has changed.

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
            raise TypeError(f"sync needs variables; got {shown(variable)}")
        if variable.synchronization is not VariableSynchronization.NONE:
            raise SynchronizationError(
                f"sync of variable {variable.name!r}: it is {variable.synchronization.name}, which "
                f"is brought together by itself; sync is for synchronization='none'"
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
    """Return the copies themselves, for a kernel that writes all of them in one call."""
    return variable._copies.arrays


class SavedVariable(NamedTuple):
    """What a checkpoint holds of a variable: ``total`` arrays, some of them in this process.

    Attributes
    ----------
    arrays : tuple of array
        Those of this process; they may be the copies themselves.
    first : int
        The number of the first of them, counted over all processes.
    total : int
        1 where the copies are equal or have an aggregate, which every process then holds; else
        one for each replica.
    """

    arrays: tuple[Any, ...]
    first: int = 0
    total: int = 1


def saved_by(variable: Variable) -> SavedVariable:
    """Return the arrays that say what a variable holds, on however many replicas.

    An aggregate brings all workers together: each of them must call this.
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


def share_out(variable: Variable) -> None:
    """Assign what the first copy holds, as in cross-replica context: after all got one value."""
    mode = SYNC_MODES[variable._synchronization]
    mode.write_across(variable._copies, variable._aggregation, "assign", copies_of(variable)[0])


def _read(value: Any) -> Any:
    return value.read_value() if isinstance(value, Variable) else value


# The operators that write in place when "=" follows, as they are written.
_SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "matmul": "@", "lshift": "<<", "rshift": ">>", "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
# The functions of NumPy that write their first argument.
_NUMPY_WRITERS = {
    np.copyto, np.put, np.place, np.putmask, np.put_along_axis, np.fill_diagonal,
}  # fmt: skip


def _refuse_to_write(out: Any, what: str, remedy: str = "") -> None:
    """Raise for a variable that is to be written as an array is: its modes would not hold."""
    if isinstance(out, Variable):
        ways = ["v.assign(x)", "v.assign_add(x)", "v.assign_sub(x)", *filter(None, [remedy])]
        raise TypeError(
            f"variable {out.name!r} is written by its methods, which keep the copies of all "
            f"replicas in step, not by {what}; use {', '.join(ways[:-1])} or {ways[-1]}"
        )


def _install_operators() -> None:
    """Give variables NumPy's operators: each acts on the value that is read, none writes it."""

    def binary(fn: Callable[[Any, Any], Any], name: str) -> None:
        def forward(self: Variable, other: Any) -> Any:
            return fn(self.read_value(), _read(other))

        def backward(self: Variable, other: Any) -> Any:
            return fn(other, self.read_value())

        setattr(Variable, f"__{name}__", forward)
        if name in ("lt", "le", "gt", "ge", "eq", "ne"):
            return
        setattr(Variable, f"__r{name}__", backward)

        # Without it Python would take ``v + x`` for ``v += x`` and put an array in the
        # variable's place.
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

    for name, one in (
        ("neg", operator.neg),
        ("pos", operator.pos),
        ("abs", operator.abs),
        ("invert", operator.invert),
    ):
        setattr(Variable, f"__{name}__", unary(one))


_install_operators()
