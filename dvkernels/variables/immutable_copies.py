"""Copies in arrays that cannot be written: a write takes new arrays, in one store.

The copies of JAX variables are kept in either of two forms, one array per device or one global
array, whose whole copy on each device is that device's. Compiled steps take and return global ones;
a form is made from the other when somebody asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from dvkernels.devices.array_spec import Array
from dvkernels.profiler import debugging
from dvkernels.variables.copies import Copies
from dvkernels.variables.modes import traceable

__all__: list[str] = []

_own_write = threading.RLock()  # replicas of one step write their own copies at the same time


class ImmutableCopies(Copies):
    """Copies of a variable in arrays of JAX, which belong to it alone: compiled steps donate them.

    So values that come from elsewhere are copied.
    """

    __slots__ = ("_other_form", "content")

    content: Any  # a tuple with an array for each device, or a global array; one store writes it
    _other_form: tuple[Any, Any]  # of a content, and made of it

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.mode = traceable(self.synchronization)

    def set_arrays(self, arrays: Iterable[Array]) -> None:
        """Take new arrays as the copies."""
        self.content = tuple(arrays)
        self._other_form = (None, None)

    @property
    def arrays(self) -> tuple[Array, ...]:  # type: ignore[override]
        """One array per device; nobody can write them."""
        content = self.content
        arrays: tuple[Array, ...] = content
        if type(content) is not tuple:
            arrays = self._made_of(content, _taken_apart)
        return arrays

    views = arrays

    @property
    def whole(self) -> Any:
        """The copies as one global array."""
        content = self.content
        if type(content) is not tuple:
            return content
        return self._made_of(content, self._assembled)

    def _made_of(self, content: Any, make: Any) -> Any:
        known, form = self._other_form
        if known is not content:
            form = make(content)
            self._other_form = (content, form)
        return form

    def _assembled(self, arrays: tuple[Array, ...]) -> Any:
        from dvkernels.communicators.jax import shard_map

        return shard_map.assembled(arrays, self.placement.mesh)

    def scratch(self) -> None:
        """Return None: the result of a write is a new array."""

    def duplicate(self) -> Copies:
        """Return new copies of the same contents, modes and name."""
        made = ImmutableCopies(
            self.arrays, self.placement, self.name, self.synchronization, self.aggregation
        )
        if self.is_slot:
            made.mark_as_slot()
        return made

    def commit_own(self, rank: int, value: Array) -> None:
        """Take a new copy for one local rank."""
        if debugging.active is not None:
            debugging.check_finite(f"the new content of variable {self.name!r}", [value])
        index = self.index_of(rank)
        new = self.memory.new(value, self.placement.copy_devices[index])
        try:
            _own_write.acquire()
            arrays = self.arrays
            self.content = (*arrays[:index], new, *arrays[index + 1 :])
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                _own_write.release()
            except RuntimeError:  # not ours
                pass


def _taken_apart(whole: Any) -> tuple[Array, ...]:
    return tuple(shard.data for shard in whole.addressable_shards)
