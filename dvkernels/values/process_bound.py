"""Base class of objects that belong to one process and cannot be pickled or copied."""

from __future__ import annotations

from typing import ClassVar, NoReturn

__all__: list[str] = []


class ProcessBound:
    """Base class whose objects refuse to be pickled or copied, with a remedy."""

    __slots__ = ()
    _bound_by: ClassVar[str]  # why not, and what to do instead

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: {type(self)._bound_by}"
        )
