"""A variable: one name for copies that are kept in step the way its modes say."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any, NoReturn, final

import numpy as np

from dvkernels import context, reduce_op
from dvkernels.communicators.placement import Placement
from dvkernels.communicators.rendezvous import Request, Step
from dvkernels.context import ReplicaContext
from dvkernels.devices import registry
from dvkernels.devices.base import Device
from dvkernels.devices.buffers import Spec
from dvkernels.errors import ContextError, NotABufferError, SynchronizationError
from dvkernels.values.distributed import DistributedValues, PerReplica
from dvkernels.variables.copies import Copies
from dvkernels.variables.modes import (
    SYNC_MODES,
    VariableAggregation,
    VariableSynchronization,
    synchronize,
)

__all__ = ["Variable"]

_numbers = itertools.count()


@final
class Variable(DistributedValues[Any]):
    """State that every replica reads and writes, kept in step by its modes.

    Parameters
    ----------
    initial_value : array-like, or callable that returns one
        Called once, so that all replicas start alike. Copied.
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

        created: Variable = frame.replica.meet(Request("Variable", terms, initial_value, act))
        return created

    # -- what it is -----------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each copy."""
        return self._copies.arrays[0].shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of each copy."""
        return self._copies.arrays[0].dtype

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
        return self._copies.placement.replica_devices

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
        copies = [array.copy() for array in self._copies.arrays]
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

    def numpy(self) -> Any:
        """Return the value as an array that the caller owns."""
        return np.array(self.read_value())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.read_value(), dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(isinstance(out, Variable) for out in kwargs.get("out", ())):
            raise TypeError("a variable cannot be the out of a ufunc; use assign")
        return getattr(ufunc, method)(*map(_read, inputs), **kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self.read_value()[_read(key)]

    def __len__(self) -> int:
        return len(self.read_value())

    def __iter__(self) -> Any:
        return iter(self.read_value())

    def __bool__(self) -> bool:
        return bool(self.read_value())

    def __float__(self) -> float:
        return float(self.read_value())

    def __int__(self) -> int:
        return int(self.read_value())

    def __index__(self) -> int:
        return operator.index(self.read_value())

    def __complex__(self) -> complex:
        return complex(self.read_value())

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

    def sync(self, op: reduce_op.Reduction | str = "mean") -> None:
        """Bring the copies of a NONE variable together: every copy gets their reduction.

        In a replica, all replicas must call it. Other modes raise ``SynchronizationError``: they
        are brought together by themselves.
        """
        reduction = reduce_op.parse(op)
        if self._synchronization is not VariableSynchronization.NONE:
            raise SynchronizationError(
                f"sync of variable {self.name!r}: it is {self._synchronization.name}, which is "
                f"brought together by itself; sync is for synchronization='none'"
            )
        reduce_op.check_dtype(f"sync of variable {self.name!r}", reduction, self.dtype)
        copies = self._copies
        replica = self._role("sync", write=True)
        if replica is None:
            synchronize(copies, list(copies.arrays), reduction)
            return

        def act(values: list[Any]) -> list[None]:
            synchronize(copies, list(copies.arrays), reduction)
            return [None] * len(values)

        terms = (copies.name, id(copies), reduction.value)
        replica.meet(Request("Variable.sync", terms, None, act))

    def _write(self, verb: str, value: Any) -> None:
        replica = self._role(verb, write=True)
        mode = SYNC_MODES[self._synchronization]
        if replica is None:
            mode.write_across(self._copies, self._aggregation, verb, value)
        else:
            mode.write_in_replica(self._copies, self._aggregation, verb, value, replica)

    def _role(self, verb: str, *, write: bool) -> ReplicaContext | None:
        """Return the replica that acts here, None for cross-replica context."""
        placement = self._copies.placement
        frame = context.find()
        if frame is None:
            return _LONE_REPLICA if placement is context.UNSCOPED else None
        if frame.placement is placement:
            return frame.replica
        if placement is not context.UNSCOPED:
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
        raise TypeError(f"variable {self.name!r} cannot be copied; take v.numpy()")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError(f"variable {self.name!r} cannot be copied yet; take v.numpy()")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"variable {self.name!r} cannot be pickled; save v.numpy()")

    def __repr__(self) -> str:
        return (
            f"<Variable {self.name!r} {Spec(self.shape, self.dtype)} "
            f"{self._synchronization.value}/{self._aggregation.value} on "
            f"{', '.join(str(device) for device in self.devices)}>"
        )


# The role of code outside every scope towards a variable that no scope created.
_LONE_REPLICA = ReplicaContext(context.UNSCOPED, Step(1), 0, None)


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
    content = initial() if callable(initial) else initial
    try:
        array = np.asarray(_read(content), dtype=dtype)
    except (TypeError, ValueError) as error:
        raise NotABufferError(
            f"variable {label!r}: the initial value {content!r:.60} is not an array: {error}"
        ) from error
    if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
        raise NotABufferError(
            f"variable {label!r}: expected numbers, the initial value is of dtype {array.dtype}"
        )
    if how is VariableAggregation.MEAN and array.dtype.kind in "biu":
        raise SynchronizationError(
            f"variable {label!r}: the mean of {array.dtype} values is not a {array.dtype}; use "
            f"aggregation 'sum' or 'only_first_replica', or a floating-point dtype"
        )
    variable = object.__new__(Variable)
    variable._copies = Copies(array, placement, label)
    variable._synchronization = when
    variable._aggregation = how
    variable._trainable = trainable
    return variable


def companion(variable: Variable, name: str) -> Variable:
    """Return a variable of zeros that lives like another: its shape, dtype and copies.

    It is written in cross-replica context only, and is not trainable.
    """
    return _created(
        np.zeros(variable.shape, variable.dtype),
        None,
        False,
        VariableSynchronization.ON_WRITE,
        VariableAggregation.NONE,
        f"{variable.name}/{name}",
        variable.owner,
    )


def copies_of(variable: Variable) -> tuple[Any, ...]:
    """Return the copies themselves, for a kernel that writes all of them in one call."""
    return variable._copies.arrays


def _read(value: Any) -> Any:
    return value.read_value() if isinstance(value, Variable) else value


def _install_operators() -> None:
    """Give variables NumPy's operators: each acts on the value that is read."""

    def binary(fn: Callable[[Any, Any], Any], name: str) -> None:
        def forward(self: Variable, other: Any) -> Any:
            return fn(self.read_value(), _read(other))

        def backward(self: Variable, other: Any) -> Any:
            return fn(other, self.read_value())

        setattr(Variable, f"__{name}__", forward)
        if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
            setattr(Variable, f"__r{name}__", backward)

    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
        binary(getattr(operator, name), name)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        binary(getattr(operator, name), name)
    for name, fn in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        binary(fn, name)

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
