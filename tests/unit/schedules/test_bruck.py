"""The laws of the gather by dissemination."""

from __future__ import annotations

import pytest

from dvkernels.schedules import bruck


@pytest.mark.parametrize("num_ranks", [*range(1, 20), 64, 100])
def test_every_rank_ends_with_every_block_once_and_where_it_is_looked_for(num_ranks):
    held = [[rank] for rank in range(num_ranks)]
    steps = [*bruck.gather(num_ranks)]
    for step in steps:
        sent = [blocks[: step.num_sent] for blocks in held]
        for rank, blocks in enumerate(held):
            assert len(blocks) == step.num_held
            blocks += sent[(rank + step.num_held) % num_ranks]
    assert len(steps) == (num_ranks - 1).bit_length()
    for rank, blocks in enumerate(held):
        places = [bruck.place(rank, owner, num_ranks) for owner in range(num_ranks)]
        assert [blocks[place] for place in places] == [*range(num_ranks)]
        assert len(blocks) == num_ranks
