"""The arrays behind a variable: checked before a write, and written all together or not at all."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np

from dvkernels.communicators.placement import Placement
from dvkernels.devices.buffers import Spec, spec
from dvkernels.errors import BufferMismatchError, NotABufferError

__all__: list[str] = []


class Copies:
    """One array per replica, of one shape and dtype."""

    __slots__ = ("_scratch", "arrays", "name", "placement", "views")

    def __init__(self, initial: Any, placement: Placement, name: str) -> None:
        self.name = name
        self.placement = placement
        self.arrays = tuple(
            np.array(initial, order="C", copy=True) for _ in placement.replica_devices
        )
        self.views = tuple(_read_only(array) for array in self.arrays)
        self._scratch: Any = None

    def checked(self, value: Any, verb: str, replica: int) -> Any:
        """Return ``value`` as an array of this shape and dtype; numbers take the dtype."""
        dtype, shape = self.arrays[0].dtype, self.arrays[0].shape
        came = "" if len(self.arrays) == 1 else f" from replica {replica}"
        try:
            if isinstance(value, (bool, int, float, complex)) and not isinstance(value, np.generic):
                array: Any = self._converted(value, dtype)
            else:
                array = np.asarray(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise NotABufferError(
                f"{verb} of variable {self.name!r} expected {Spec(shape, dtype)}, got "
                f"{value!r:.60}{came}, which does not fit: {error}"
            ) from error
        if array.dtype != dtype or array.shape != shape:
            raise BufferMismatchError(
                f"{verb} of variable {self.name!r} expected {Spec(shape, dtype)}, got "
                f"{spec(array)}{came}; cast with .astype or reshape it first"
            )
        return array

    def _converted(self, value: complex, dtype: Any) -> Any:
        if dtype.kind == "b" and not isinstance(value, bool):
            raise TypeError(f"a number is not a {dtype}")
        if dtype.kind in "iu" and not isinstance(value, int):
            raise TypeError(f"a {type(value).__name__} is not a {dtype}")
        return np.array(value, dtype)

    def scratch(self) -> Any:
        """Return an array to work out a write in, before it is committed.

        One more copy in memory, kept from the first sum on: a new one for every step would
        be faulted in by the operating system each time, which takes longer than the sum.
        """
        if self._scratch is None:
            self._scratch = np.empty_like(self.arrays[0])
        return self._scratch

    def commit(self, values: Sequence[Any]) -> None:
        """Overwrite copy r with ``values[r]``, for all r; values have been :meth:`checked`.

        One expression that never enters the interpreter's loop, so that an interrupt falls before
        or after all of it: the copies cannot be left half-written.
        """
        write: Any = operator.setitem
        deque(map(write, self.arrays, repeat(...), values), maxlen=0)


def _read_only(array: Any) -> Any:
    view = array.view()
    view.flags.writeable = False
    return view
