"""Laws of the schedule of the ring all-reduce."""

from __future__ import annotations

from collections import Counter

import pytest

from dvkernels.schedules import ring


def test_the_schedule_of_three_ranks_is_the_table_in_its_comment() -> None:
    sent = [[step.chunk for step in tick] for tick in ring.all_reduce(3)]
    assert sent == [[0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 1, 2]]


@pytest.mark.parametrize("num_ranks", range(1, 18))
def test_every_rank_ends_with_every_contribution_once(num_ranks: int) -> None:
    held = [[Counter({rank: 1}) for _ in range(num_ranks)] for rank in range(num_ranks)]
    for tick in ring.all_reduce(num_ranks):
        for chunk, source, target, accumulate in tick:
            before = held[target][chunk] if accumulate else Counter()
            held[target][chunk] = before + held[source][chunk]
    assert all(chunk == Counter(range(num_ranks)) for rank in held for chunk in rank)
