"""Copies of a variable: checks before a write, and writes of all copies or none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from dvkernels.devices import array_memory, interop
from dvkernels.devices.array_spec import Array, HostArray, Spec, refuse_masked, spec
from dvkernels.errors import BufferMismatchError, ContextError, NotABufferError
from dvkernels.kernels import backends
from dvkernels.profiler import debugging, tracing
from dvkernels.profiler.memory_report import Holding
from dvkernels.schedules import cost_model
from dvkernels.user_errors import brief, text_of
from dvkernels.values.distributed import DistributedValues, PerReplica
from dvkernels.values.placement import Placement
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization
from dvkernels.variables.table_server import SERVED, Server, TableServer

__all__: list[str] = []

_SHARED_NBYTES = cost_model.CPU.sharing_pays_from()  # read and written


class Copies:
    """Arrays of a variable, one per device that holds a copy, and the modes that it follows.

    All arrays have one shape and dtype. ``initial`` is the content of each copy, or a single
    content for all of them.
    """

    __slots__ = (
        "__weakref__",
        "_holdings",
        "_scratch",
        "aggregation",
        "arrays",
        "is_slot",
        "memory",
        "mode",
        "name",
        "placement",
        "server",
        "synchronization",
        "views",
    )

    arrays: tuple[Array, ...]
    views: tuple[Array, ...]  # read-only

    def __init__(
        self,
        initial: Sequence[Array],
        placement: Placement,
        name: str,
        synchronization: VariableSynchronization,
        aggregation: VariableAggregation,
    ) -> None:
        self.name = name
        self.placement = placement
        self.memory = placement.memory
        self.synchronization = synchronization
        self.aggregation = aggregation
        self.is_slot = False  # of an optimizer
        self._scratch: Array | None = None
        devices = placement.copy_devices
        each = initial if len(initial) == len(devices) else [initial[0]] * len(devices)
        self.set_arrays(map(self.memory.new, each, devices))
        self._holdings = [
            Holding(str(device), "variables", array.nbytes)
            for device, array in zip(devices, self.arrays, strict=True)
        ]
        self.mode: Any = synchronization
        self.server: Server | None = None
        if placement.deal_rows is not None:
            like = self.arrays[0]
            self.set_server(TableServer(placement.deal_rows(like.shape, like.dtype, name)))

    def set_server(self, server: Server) -> None:
        """Let a server carry out all reads and writes."""
        self.mode, self.server = SERVED, server

    def forget_other_form(self) -> None:
        """Do nothing: arrays that are written in place have one form."""

    def on_host(self, read: Callable[[], Any]) -> Any:
        """Return a value that ``read`` takes of the copies: NumPy's functions take it as it is."""
        return read()

    def set_arrays(self, arrays: Iterable[Array]) -> None:
        """Take new arrays as the copies."""
        self.arrays = tuple(arrays)
        self.views = tuple(map(self.memory.read_only, self.arrays))

    def duplicate(self) -> Copies:
        """Return new copies of the same contents, modes and name."""
        # One content for equal copies, even if another thread writes them meanwhile.
        are_equal = self.synchronization is VariableSynchronization.ON_WRITE
        initial = self.arrays[:1] if are_equal else self.arrays
        made = Copies(initial, self.placement, self.name, self.synchronization, self.aggregation)
        if self.is_slot:
            made.mark_as_slot()
        return made

    def mark_as_slot(self) -> None:
        """Count the memory as that of an optimizer."""
        self.is_slot = True
        for holding in self._holdings:
            holding.move_to("slots")

    def index_of(self, rank: int) -> int:
        """Return the index of the copy that a local rank reads: its own, or the only one."""
        return rank if len(self.arrays) > 1 else 0

    def read_by(self, replica: int | None) -> Array:
        """Return the copy that a replica reads; the first copy for None."""
        if not replica:
            return self.arrays[0]
        return self.arrays[self.index_of(replica - self.placement.first_replica)]

    # -- values to write ------------------------------------------------------------------------

    def checked(self, value: Any, verb: str, replica: int | None) -> Any:
        """Return ``value`` as an array of this shape and dtype; Python numbers take the dtype.

        ``replica`` is the id of the replica that writes, None in cross-replica context. The array
        lies on the device of the copy that this replica reads, or of the first copy.
        """
        array = self.converted(value, verb, replica)
        shape, dtype = self.arrays[0].shape, self.arrays[0].dtype
        if array.dtype != dtype or array.shape != shape:
            raise BufferMismatchError(
                f"{verb} of variable {self.name!r} expected {Spec(shape, dtype)}, got "
                f"{spec(array)}{self._from(replica)}; cast with .astype or reshape it first"
            )
        if debugging.active is not None:
            debugging.check_finite(f"{verb} of variable {self.name!r}", [array])
        return self.memory.to_device_of(array, self.read_by(replica))

    def converted(self, value: Any, verb: str, replica: int | None) -> Any:
        """Return ``value`` as an array; Python numbers take this dtype, arrays keep theirs."""
        if interop.is_foreign(value):
            return self.memory.view(verb, value, f"the value{self._from(replica)}")
        try:
            if isinstance(value, (bool, int, float, complex)) and not isinstance(value, np.generic):
                return _number(value, self.arrays[0].dtype)
            if type(value) is not np.ndarray:
                what = f"{verb} of variable {self.name!r}: the value{self._from(replica)}"
                refuse_masked(value, what)
            array: HostArray = np.asarray(value)
            if array.dtype.hasobject:
                raise TypeError(f"a {type(value).__name__} is not a number or an array of numbers")
            if self.memory.is_immutable:
                array = array.astype(self.memory.kept_dtype(array.dtype), copy=False)
            return array
        except NotABufferError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise NotABufferError(
                f"{verb} of variable {self.name!r} expected {spec(self.arrays[0])}, got "
                f"{brief(value, 60)}{self._from(replica)}, which does not fit: {text_of(error)}"
            ) from error

    def _from(self, replica: int | None) -> str:
        is_clear = replica is None or self.placement.num_replicas == 1
        return "" if is_clear else f" from replica {replica}"

    def checked_for_all(self, value: Any, verb: str) -> Any:
        """Return one checked array for all copies of all workers: that of the first worker."""
        checked = self.checked(value_for_all(value), verb, None)
        return self.placement.broadcast_from_chief(checked)

    def components(self, value: Any, verb: str) -> Sequence[Any]:
        """Return one value per copy: the components of a ``PerReplica``, or one value for all."""
        if not isinstance(value, PerReplica):
            return [value_for_all(value)] * len(self.arrays)
        is_foreign = value.owner is not None and value.owner is not self.placement
        if is_foreign or len(value) != len(self.arrays):
            raise ContextError(
                f"{verb} of variable {self.name!r} expected a PerReplica of its own strategy's "
                f"{len(self.arrays)} replicas, got one of {len(value)} replicas"
            )
        return value.values

    # -- writes of all copies -------------------------------------------------------------------

    def scratch(self) -> Any:
        """Return an array in which a write is computed before it is committed.

        It takes the memory of one more copy and is kept from the first sum on: the page faults of
        a new array in every step would take longer than the sum.
        """
        if self._scratch is None:
            self._scratch = self.memory.apply(np.empty_like, self.arrays[0])
            device = str(self.placement.copy_devices[0])
            self._holdings.append(Holding(device, "workspaces", self._scratch.nbytes))
        return self._scratch

    def commit(self, values: Sequence[Array]) -> None:
        """Overwrite copy r with ``values[r]``, for all r; values must be :meth:`checked`."""
        commit_together([(self, values)])

    def commit_own(self, rank: int, value: Array) -> None:
        """Overwrite the copy of one local rank."""
        if debugging.active is not None:
            debugging.check_finite(f"the new content of variable {self.name!r}", [value])
        began = 0 if tracing.active is None else tracing.active.begin("write")
        self.memory.overwrite([self.arrays[self.index_of(rank)]], [value])
        if began:
            trace_write(began, [self], value.nbytes)

    def arrays_to_scatter(self) -> Sequence[Array]:
        """Return the arrays some of whose rows are about to be written."""
        return self.arrays


def commit_together(writes: Sequence[tuple[Copies, Sequence[Array]]]) -> None:
    """Overwrite the copies of several variables, each with its values.

    One uninterruptible call of the memory: an interrupt leaves all copies written, or none.
    """
    if debugging.active is not None:
        for copies, contents in writes:
            check_written(copies, contents)
    began = 0 if tracing.active is None else tracing.active.begin("write")
    memory = writes[0][0].memory
    arrays = [array for copies, _ in writes for array in copies.arrays]
    values = [value for _, contents in writes for value in contents]
    if memory.is_immutable:
        _rebind_together(writes)
    elif memory is array_memory.HOST and _may_share(writes, arrays):
        groups = [[contents[0], *copies.arrays] for copies, contents in writes]
        backends.cpu().broadcast_many_unchecked(groups)
    else:
        memory.overwrite(arrays, values)
    if began:
        nbytes = sum(value.nbytes for value in values)
        trace_write(began, [copies for copies, _ in writes], nbytes)


def _rebind_together(writes: Sequence[tuple[Copies, Sequence[Array]]]) -> None:
    """Let the copies of several variables be copies of the values, each on its device."""
    contents = [
        tuple(map(copies.memory.new, values, copies.placement.copy_devices))
        for copies, values in writes
    ]
    rebind([copies for copies, _ in writes], contents)
    for copies, _ in writes:
        copies.forget_other_form()


def rebind(written: Sequence[Copies], contents: Iterable[Any]) -> None:
    """Store new contents, in one expression during which the interpreter handles no signal.

    ``contents`` may be an iterator that computes them: an interrupt comes before or after all of it
    if it enters no Python code.
    """
    deque(map(setattr, written, repeat("content"), contents), maxlen=0)


def trace_write(began: int, written: Sequence[Copies], nbytes: int) -> None:
    """Record a write in the trace, if it has not ended meanwhile."""
    recording = tracing.active
    if recording is not None:
        names, dtype = [copies.name for copies in written], str(written[0].arrays[0].dtype)
        about = {"variables": names, "bytes": nbytes, "dtype": dtype}
        recording.end("write", "write", began, about)


def _may_share(writes: Sequence[tuple[Copies, Sequence[Any]]], arrays: Sequence[Any]) -> bool:
    """Return whether equal copies are so large that several cores should write them."""
    moved = 0
    for copies, contents in writes:
        value = contents[0]
        if len(copies.arrays) == 1 or any(other is not value for other in contents):
            return False
        moved += value.nbytes * (1 + len(contents))
    return moved >= _SHARED_NBYTES and not any(
        np.may_share_memory(contents[0], array) for _, contents in writes for array in arrays
    )


def check_written(copies: Copies, values: Sequence[Array]) -> None:
    """In debug mode: raise if the new content is not finite, and record the write."""
    distinct = {id(value): value for value in values}
    debugging.check_finite(f"the new content of variable {copies.name!r}", distinct.values())
    if debugging.active is not None:
        debugging.active.note_written(id(copies))


def value_for_all(value: Any) -> Any:
    """Return a value for all copies: the first component of a ``Mirrored``, a variable's value."""
    if isinstance(value, PerReplica) or not isinstance(value, DistributedValues):
        return value
    return value.at(0) if not hasattr(value, "read_value") else value.read_value()


def _number(value: complex, dtype: np.dtype[Any]) -> HostArray:
    if dtype.kind == "b" and not isinstance(value, bool):
        raise TypeError(f"a number is not a {dtype}")
    if dtype.kind in "iu" and not isinstance(value, int):
        raise TypeError(f"a {type(value).__name__} is not a {dtype}")
    return np.array(value, dtype)
