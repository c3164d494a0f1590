"""Copies in arrays that cannot be written: a write takes new arrays, in one store.

The copies of JAX variables are kept in either of two forms, one array per device or one global
array, whose whole copy on each device is that device's. Compiled steps take and return global ones;
a form is made from the other when somebody asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dvkernels import context
from dvkernels.devices.array_spec import Array
from dvkernels.errors import NotABufferError
from dvkernels.profiler import debugging
from dvkernels.values.distributed import PerReplica
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
        if type(content) is tuple:
            return self._made_of(content, self._assembled)
        known, parts = self._other_form
        if known is content and _is_deleted(parts):  # XLA would crash
            self.replace_deleted()
            raise NotABufferError(
                f"variable {self.name!r}: an array of its v.values has been deleted, or donated to "
                f"a program, and with it the copy; it holds NaN, or 0, until it is assigned, or "
                f"restored"
            )
        return content

    def _made_of(self, content: Any, make: Any) -> Any:
        known, form = self._other_form
        if known is not content:
            form = make(content)
            self._other_form = (content, form)
        return form

    def forget_other_form(self) -> None:
        """Free the form of a content that has been replaced."""
        self._other_form = (None, None)

    def replace_deleted(self) -> bool:
        """Return whether a program took the content and gave no other; fill it with NaN, or 0."""
        content = self.content
        if not _is_deleted(content) or self.placement.workers.size > 1:
            return False
        content = content[0] if type(content) is tuple else content
        fill = np.nan if content.dtype.kind not in "biu" else 0
        new = np.full(content.shape, fill, content.dtype)
        self.set_arrays([self.memory.new(new, device) for device in self.placement.copy_devices])
        return True

    def on_host(self, read: Callable[[], Any]) -> Any:
        """Return a value that ``read`` takes of the copies, in host memory, a traced one as it is.

        A step that another thread runs may delete what has been read: then it is awaited.
        """
        content = self.content
        try:
            return self._fetched(read())
        except Exception:  # JAX has several, where an array is deleted while it is read
            frame = context.find()
            is_inside = frame is not None and (frame.replica is not None or frame.merging)
            if is_inside or (content is self.content and not _is_deleted(content)):
                raise
        what = f"read of variable {self.name!r}"
        return self.placement.step_lock.between_steps(lambda: self._fetched(read()), what)

    def _fetched(self, value: Any) -> Any:
        from dvkernels.communicators.jax import shard_map
        from dvkernels.devices import jax_arrays

        workers = self.placement.workers
        if isinstance(value, PerReplica) and self.placement.num_replicas == 1:
            value = value.at(0)
        if isinstance(value, PerReplica) or jax_arrays.is_traced(value):
            return value
        if workers.size > 1 and hasattr(value, "is_ready"):
            with shard_map.losses_of(workers):
                shard_map.await_program([value], workers)
        return self.memory.to_host(value)

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
            self._other_form = (None, None)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                _own_write.release()
            except RuntimeError:  # not ours
                pass


def _taken_apart(whole: Any) -> tuple[Array, ...]:
    from dvkernels.communicators.jax import shard_map

    return shard_map.taken_apart(whole)


def _is_deleted(content: Any) -> bool:
    arrays = content if type(content) is tuple else (content,)
    return any(array.is_deleted() for array in arrays)
