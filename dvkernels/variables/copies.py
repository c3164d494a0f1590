"""Copies of a variable: checks before a write, and writes of all copies or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dvkernels.communicators.single import Single
from dvkernels.devices import interop
from dvkernels.devices.array_spec import Spec, refuse_masked, spec
from dvkernels.errors import BufferMismatchError, ContextError, NotABufferError
from dvkernels.profiler import debugging
from dvkernels.user_errors import brief, text_of
from dvkernels.values.placement import Placement

__all__: list[str] = []


class Copies:
    """Arrays of a variable: one per device that holds a copy, all of one shape and dtype.

    ``initial`` is the content of each copy, or a single content for all of them.
    """

    __slots__ = (
        "__weakref__",
        "_scratch",
        "arrays",
        "is_slot",
        "memory",
        "name",
        "placement",
        "views",
    )

    arrays: tuple[Any, ...]
    views: tuple[Any, ...]

    def __init__(self, initial: Sequence[Any], placement: Placement, name: str) -> None:
        self.name = name
        self.placement = placement
        self.memory = placement.memory
        devices = placement.copy_devices
        each = initial if len(initial) == len(devices) else [initial[0]] * len(devices)
        self._set_arrays(map(self.memory.new, each, devices))
        self._scratch: Any = None
        self.is_slot = False  # an optimizer slot

    def _set_arrays(self, arrays: Iterable[Any]) -> None:
        self.arrays = tuple(arrays)
        self.views = tuple(map(self.memory.read_only, self.arrays))

    def index_of(self, rank: int) -> int:
        """Return the index of the copy that a local rank reads: its own, or the only one."""
        return rank if len(self.arrays) > 1 else 0

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

    def read_by(self, replica: int | None) -> Any:
        """Return the copy that a replica reads; the first copy for None."""
        if not replica:
            return self.arrays[0]
        return self.arrays[self.index_of(replica - self.placement.first_replica)]

    def converted(self, value: Any, verb: str, replica: int | None) -> Any:
        """Return ``value`` as an array; Python numbers take this dtype, arrays keep theirs."""
        shape, dtype = self.arrays[0].shape, self.arrays[0].dtype
        origin = self._from(replica)
        if interop.is_foreign(value):
            return self.memory.view(verb, value, f"the value{origin}")
        try:
            if isinstance(value, (bool, int, float, complex)) and not isinstance(value, np.generic):
                return self._number(value, dtype)
            if type(value) is not np.ndarray:
                refuse_masked(value, f"{verb} of variable {self.name!r}: the value{origin}")
            array = np.asarray(value)
            if array.dtype.hasobject:
                raise TypeError(f"a {type(value).__name__} is not a number or an array of numbers")
            return array
        except NotABufferError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise NotABufferError(
                f"{verb} of variable {self.name!r} expected {Spec(shape, dtype)}, got "
                f"{brief(value, 60)}{origin}, which does not fit: {text_of(error)}"
            ) from error

    def _from(self, replica: int | None) -> str:
        is_clear = replica is None or self.placement.num_replicas == 1
        return "" if is_clear else f" from replica {replica}"

    def _number(self, value: complex, dtype: Any) -> Any:
        if dtype.kind == "b" and not isinstance(value, bool):
            raise TypeError(f"a number is not a {dtype}")
        if dtype.kind in "iu" and not isinstance(value, int):
            raise TypeError(f"a {type(value).__name__} is not a {dtype}")
        return np.array(value, dtype)

    @property
    def has_scratch(self) -> bool:
        """Whether :meth:`scratch` holds an array."""
        return self._scratch is not None

    def scratch(self) -> Any:
        """Return an array in which a write is computed before it is committed.

        It takes the memory of one more copy and is kept from the first sum on: the page faults of
        a new array in every step would take longer than the sum.
        """
        if self._scratch is None:
            self._scratch = self.memory.apply(np.empty_like, self.arrays[0])
        return self._scratch

    def commit(self, values: Sequence[Any]) -> None:
        """Overwrite copy r with ``values[r]``, for all r; values must be :meth:`checked`."""
        commit_together([(self, values)])

    def commit_own(self, rank: int, value: Any) -> None:
        """Overwrite the copy of one local rank."""
        if debugging.active is not None:
            debugging.check_finite(f"the new content of variable {self.name!r}", [value])
        self.memory.overwrite([self.arrays[self.index_of(rank)]], [value])

    def commit_rows(self, rows: Sequence[Any], values: Sequence[Any]) -> None:
        """Overwrite the rows ``rows[r]`` of copy r with ``values[r]``, for all r."""
        if debugging.active is not None:
            _check_written(self, values)
        self.memory.overwrite_rows(self.arrays, rows, values)


class Draft(Copies):
    """Copy of a variable in ``update``: its writes go to an array of its own until the commit.

    So a function that fails at the third copy has not changed the first two.
    """

    __slots__ = ("has_ended", "is_written")

    def __init__(self, copies: Copies, rank: int) -> None:
        parent = copies.placement
        device = (parent.copy_devices[rank],)
        self.name = copies.name if rank == 0 else f"{copies.name}/replica_{rank}"
        self.placement = Placement(device, Single(), parent.name, parent=parent)
        self.memory = copies.memory
        self.arrays = (copies.arrays[rank],)
        self.views = (copies.views[rank],)
        self.has_ended = False
        self.is_written = False
        self._scratch = None
        self.is_slot = copies.is_slot

    def commit(self, values: Sequence[Any]) -> None:
        """Write the draft's own array; the first write allocates it."""
        if self.has_ended:
            raise ContextError(
                f"this copy of variable {self.name!r} belongs to an update that has ended; write "
                f"the variable itself"
            )
        if self.is_written:
            super().commit(values)
        else:
            self._set_arrays([self.memory.copy_to_device_of(values[0], self.arrays[0])])
            self.is_written = True

    def commit_rows(self, rows: Sequence[Any], values: Sequence[Any]) -> None:
        """Write rows of the draft's own array; the first write allocates it."""
        if not self.is_written:
            self.commit(self.arrays)
        assert not self.has_ended
        super().commit_rows(rows, values)


def commit_together(writes: Sequence[tuple[Copies, Sequence[Any]]]) -> None:
    """Overwrite the copies of several variables, each with its values.

    One uninterruptible call of the memory: an interrupt leaves all copies written, or none.
    """
    if debugging.active is not None:
        for copies, contents in writes:
            _check_written(copies, contents)
    arrays = [array for copies, _ in writes for array in copies.arrays]
    values = [value for _, contents in writes for value in contents]
    writes[0][0].memory.overwrite(arrays, values)


def _check_written(copies: Copies, values: Sequence[Any]) -> None:
    """In debug mode: raise if the new content is not finite, and record the write."""
    distinct = {id(value): value for value in values}
    debugging.check_finite(f"the new content of variable {copies.name!r}", distinct.values())
    if debugging.active is not None:
        debugging.active.note_written(id(copies))
