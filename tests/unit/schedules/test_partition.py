"""Partition of a length, compared with numpy.array_split."""

from __future__ import annotations

import numpy as np
import pytest

from dvkernels.schedules import partition


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [0, 1, 6, 7, 100])
def test_parts_are_those_of_array_split(length: int, num_parts: int) -> None:
    expected = [len(part) for part in np.array_split(np.arange(length), num_parts)]
    cuts = partition.parts(length, num_parts)
    assert [stop - start for start, stop in cuts] == expected
    assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]


@pytest.mark.parametrize("arguments", [(4, 0, 0), (-1, 2, 0), (4, 2, 2), (4, 2, -1)])
def test_nonsense_raises(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"got|must"):
        partition.bounds(*arguments)


def test_each_run_starts_where_its_predecessor_stops() -> None:
    assert partition.starts([]) == [0]
    assert partition.starts([3, 0, 2]) == [0, 3, 3, 5]
