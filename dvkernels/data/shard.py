"""How a batch is cut into one part per replica."""

from __future__ import annotations

import itertools

__all__ = ["even_slices"]


def even_slices(length: int, num_parts: int) -> tuple[slice, ...]:
    """Cut ``range(length)`` into ``num_parts`` slices as evenly as it goes, larger ones first.

    Examples
    --------
    >>> even_slices(8, 3)
    (slice(0, 3, None), slice(3, 6, None), slice(6, 8, None))
    """
    small, num_larger = divmod(length, num_parts)
    bounds = [part * small + min(part, num_larger) for part in range(num_parts + 1)]
    return tuple(slice(start, stop) for start, stop in itertools.pairwise(bounds))
