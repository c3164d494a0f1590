"""What belongs to the process that made it, and cannot be pickled or copied."""

from __future__ import annotations

from typing import ClassVar, NoReturn

__all__: list[str] = []


class ProcessBound:
    """A base for classes whose objects are neither pickled nor copied; they say what to do."""

    __slots__ = ()
    _bound_by: ClassVar[str]  # what ties it to this process, and what to do instead

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: {type(self)._bound_by}"
        )
