"""Laws of Bruck's all-gather."""

from __future__ import annotations

import pytest

from dvkernels.schedules import bruck


@pytest.mark.parametrize("num_ranks", [*range(1, 20), 64, 100])
def test_every_rank_ends_with_every_block_once_in_its_slot(num_ranks):
    held = [[rank] for rank in range(num_ranks)]
    steps = [*bruck.all_gather(num_ranks)]
    for step in steps:
        sent = [blocks[: step.num_sent] for blocks in held]
        for rank, blocks in enumerate(held):
            assert len(blocks) == step.num_blocks
            blocks += sent[(rank + step.num_blocks) % num_ranks]
    assert len(steps) == (num_ranks - 1).bit_length()
    for rank, blocks in enumerate(held):
        places = [bruck.slot(rank, owner, num_ranks) for owner in range(num_ranks)]
        assert [blocks[place] for place in places] == [*range(num_ranks)]
        assert len(blocks) == num_ranks
