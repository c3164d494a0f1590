"""The variable: state with one copy per replica, kept consistent by its modes."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn, final

import numpy as np

from dvkernels import context, html_table
from dvkernels.devices.array_spec import Array, Spec
from dvkernels.devices.device import Device
from dvkernels.errors import ContextError
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.user_errors import brief
from dvkernels.values.distributed import DistributedValues
from dvkernels.values.placement import Placement
from dvkernels.values.scalar_checks import is_integer
from dvkernels.variables import deep_copy
from dvkernels.variables.access import LONE_REPLICA, calling_replica
from dvkernels.variables.copies import Copies
from dvkernels.variables.initial_value import initial_copies
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization
from dvkernels.variables.reads import VariableReads
from dvkernels.variables.writes import VariableWrites

__all__ = ["Variable"]


@final
class Variable(VariableReads, VariableWrites, DistributedValues[Any]):
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

    __slots__ = ("__weakref__", "_copies", "_trainable")
    __hash__ = None  # type: ignore[assignment]
    _copies: Copies
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
            return new_variable(copies, bool(trainable))

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

        call = CollectiveCall("Variable", terms, initial_value, act)
        created: Variable = frame.replica.meet(call)
        return created

    # -- description ----------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each copy."""
        return self._copies.arrays[0].shape

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
        return self._copies.synchronization

    @property
    def aggregation(self) -> VariableAggregation:
        """The reduction of the replicas' values to one value."""
        return self._copies.aggregation

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the copies of this process, in replica order."""
        return self._copies.placement.copy_devices

    def on(self, replica_id: int) -> Any:
        """Return a read-only view of the copy that a replica reads, valid until the next write.

        Parameters and errors as for :meth:`DistributedValues.on`. Under central storage all
        replicas read the only copy.
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
        frame = context.find()
        if frame is not None and frame.replica is not None and frame.replica.trace is not None:
            raise ContextError(
                f"values of variable {self.name!r} in a step that JAX compiles: they would be "
                f"constants of the program; use read_value()"
            )
        return self._copies.views

    # -- copying, pickling, printing ------------------------------------------------------------

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
        made = new_variable(deep_copy.between_steps(self._copies), self._trainable)
        memo[id(self)] = made
        deep_copy.report(memo, self, made)
        return made

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"variable {self.name!r} cannot be pickled: its copies belong to a strategy of this "
            f"process; pass on v.numpy(), or save it with dv.Checkpoint"
        )

    def __repr__(self) -> str:
        return (
            f"<Variable {self.name!r} {Spec(self.shape, self.dtype)} "
            f"{self.synchronization.value}/{self.aggregation.value} on "
            f"{', '.join(str(device) for device in self.devices)}>"
        )

    _repr_html_ = html_table.of_attributes(
        name="name", shape=lambda self: str(self.shape), dtype="dtype", devices="devices",
        synchronization="synchronization", aggregation="aggregation",
    )  # fmt: skip


def new_variable(copies: Copies, trainable: bool, *, is_draft: bool = False) -> Variable:
    """Return a variable of these copies, listed among the living unless it is a draft."""
    variable = object.__new__(Variable)
    variable._copies = copies
    variable._trainable = trainable
    if not is_draft:
        _living[id(variable)] = variable
    return variable


def slot_of(variable: Variable, name: str, content: Array | None = None) -> Variable:
    """Return an optimizer slot: a variable of the same shape, dtype and devices, zeros at first.

    It is not trainable, and is written in cross-replica context only.
    """
    initial = np.zeros(variable.shape, variable.dtype) if content is None else content
    when, how = VariableSynchronization.ON_WRITE, VariableAggregation.NONE
    label = f"{variable.name}/{name}"
    copies = initial_copies(initial, None, when, how, label, variable.owner)
    copies.mark_as_slot()
    server = variable._copies.server
    if server is not None:  # which changes a row and its slots together
        copies.set_server(server)
    return new_variable(copies, trainable=False)


def copies_of(variable: Variable) -> tuple[Any, ...]:
    """Return the writable arrays of the copies, for kernels that write all of them in one call."""
    return variable._copies.arrays


def storage_of(variable: Variable) -> Copies:
    """Return the object that holds the copies of a variable, for the modules of this package."""
    return variable._copies


# By id, because variables compare elementwise and have no hash. For debug mode.
_living: weakref.WeakValueDictionary[int, Variable] = weakref.WeakValueDictionary()


def variables_of(placement: Placement) -> list[Variable]:
    """Return the variables of a strategy that are still alive."""
    return [variable for variable in list(_living.values()) if variable.owner is placement]
