"""The arrays behind a variable: checked before a write, and written all together or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dvkernels.communicators.single import Single
from dvkernels.devices import interop
from dvkernels.devices.buffers import Spec, refuse_masked, spec
from dvkernels.errors import BufferMismatchError, ContextError, NotABufferError
from dvkernels.profiler import debugging
from dvkernels.user_errors import shown, text_of
from dvkernels.values.placement import Placement

__all__: list[str] = []


class Copies:
    """One array for each device that holds a copy, of one shape and dtype.

    ``initial`` holds the content of each copy, or of all where there is one.
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
        self._hold(map(self.memory.new, each, devices))
        self._scratch: Any = None
        self.is_slot = False  # of an optimizer

    def _hold(self, arrays: Iterable[Any]) -> None:
        self.arrays = tuple(arrays)
        self.views = tuple(map(self.memory.read_only, self.arrays))

    def index_of(self, rank: int) -> int:
        """Return which copy a local replica reads: its own, or the only one."""
        return rank if len(self.arrays) > 1 else 0

    def checked(self, value: Any, verb: str, replica: int | None) -> Any:
        """Return ``value`` as an array of this shape and dtype; numbers take the dtype.

        ``replica`` is who brought it, None in cross-replica context. The array lies where the
        copy that this replica reads lies, or the first one.
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
        return self.memory.near(array, self.read_by(replica))

    def read_by(self, replica: int | None) -> Any:
        """Return the copy that a replica reads; the first one for None."""
        if not replica:
            return self.arrays[0]
        return self.arrays[self.index_of(replica - self.placement.first_replica)]

    def converted(self, value: Any, verb: str, replica: int | None) -> Any:
        """Return ``value`` as an array, numbers with this dtype; others keep theirs."""
        shape, dtype = self.arrays[0].shape, self.arrays[0].dtype
        came = self._from(replica)
        if interop.is_foreign(value):
            return self.memory.view(verb, value, f"the value{came}")
        try:
            if isinstance(value, (bool, int, float, complex)) and not isinstance(value, np.generic):
                return self._number(value, dtype)
            if type(value) is not np.ndarray:
                refuse_masked(value, f"{verb} of variable {self.name!r}: the value{came}")
            array = np.asarray(value)
            if array.dtype.hasobject:
                raise TypeError(f"a {type(value).__name__} is no number or array of numbers")
            return array
        except NotABufferError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise NotABufferError(
                f"{verb} of variable {self.name!r} expected {Spec(shape, dtype)}, got "
                f"{shown(value, 60)}{came}, which does not fit: {text_of(error)}"
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
        """Return an array to work out a write in, before it is committed.

        One more copy in memory, kept from the first sum on: a new one for every step would
        be faulted in by the operating system each time, which takes longer than the sum.
        """
        if self._scratch is None:
            self._scratch = self.memory.apply(np.empty_like, self.arrays[0])
        return self._scratch

    def commit(self, values: Sequence[Any]) -> None:
        """Overwrite copy r with ``values[r]``, for all r; values have been :meth:`checked`."""
        commit_together([(self, values)])

    def commit_own(self, rank: int, value: Any) -> None:
        """Overwrite the copy of one local replica."""
        if debugging.active is not None:
            debugging.check_finite(f"the new content of variable {self.name!r}", [value])
        self.memory.overwrite([self.arrays[self.index_of(rank)]], [value])

    def commit_rows(self, rows: Sequence[Any], values: Sequence[Any]) -> None:
        """Overwrite the rows ``rows[r]`` of copy r with ``values[r]``, for all r."""
        if debugging.active is not None:
            _look_at(self, values)
        self.memory.overwrite_rows(self.arrays, rows, values)


class Draft(Copies):
    """One copy of a variable as ``update`` shows it: its writes wait in an array of their own.

    So a function that fails at the third copy has not changed the first two.
    """

    __slots__ = ("has_ended", "is_written")

    def __init__(self, of: Copies, rank: int) -> None:
        whole = of.placement
        device = (whole.copy_devices[rank],)
        self.name = of.name if rank == 0 else f"{of.name}/replica_{rank}"
        self.placement = Placement(device, Single(), whole.name, whole=whole)
        self.memory = of.memory
        self.arrays = (of.arrays[rank],)
        self.views = (of.views[rank],)
        self.has_ended = False
        self.is_written = False
        self._scratch = None
        self.is_slot = of.is_slot

    def commit(self, values: Sequence[Any]) -> None:
        """Hold the content."""
        if self.has_ended:
            raise ContextError(
                f"this copy of variable {self.name!r} belongs to an update that has ended; write "
                f"the variable itself"
            )
        if self.is_written:
            super().commit(values)
        else:
            self._hold([self.memory.beside(values[0], self.arrays[0])])
            self.is_written = True

    def commit_rows(self, rows: Sequence[Any], values: Sequence[Any]) -> None:
        """Hold the content with these rows."""
        if not self.is_written:
            self.commit(self.arrays)
        assert not self.has_ended
        super().commit_rows(rows, values)


def commit_together(writes: Sequence[tuple[Copies, Sequence[Any]]]) -> None:
    """Overwrite the copies of several variables, each with its values.

    Their memory does so at once: an interrupt cannot leave the copies half-written.
    """
    if debugging.active is not None:
        for copies, given in writes:
            _look_at(copies, given)
    arrays = [array for copies, _ in writes for array in copies.arrays]
    values = [value for _, given in writes for value in given]
    writes[0][0].memory.overwrite(arrays, values)


def _look_at(copies: Copies, values: Sequence[Any]) -> None:
    """In debug mode: refuse new content that is not finite, and note that there is some."""
    each = {id(value): value for value in values}
    debugging.check_finite(f"the new content of variable {copies.name!r}", each.values())
    if debugging.active is not None:
        debugging.active.note_written(id(copies))
