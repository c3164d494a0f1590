"""All-reduces by flags: their rows, waits and bytes."""

from __future__ import annotations

from collections import Counter

import pytest

from dvkernels.schedules import flag_all_reduce
from dvkernels.schedules.flag_protocol import BufferRole, Combine, Protocol, Signal, Wait

RANKS = range(1, 9)


def combines(protocol: Protocol, rank: int) -> list[Combine]:
    return [row for row in protocol.rows[rank] if isinstance(row, Combine)]


def waits(protocol: Protocol) -> int:
    return sum(isinstance(row, Wait) for row in protocol.rows[0])


def fraction_from_others(protocol: Protocol, rank: int) -> float:
    """Return the fraction of a buffer that a rank loads from memory of others."""
    return sum(
        sum(place.rank != rank for place in row.sources) / protocol.num_parts
        for row in combines(protocol, rank)
    )


def test_one_shot_of_two_is_this_table() -> None:
    mine, yours = BufferRole("slot", 0), BufferRole("slot", 1)
    assert flag_all_reduce.one_shot(2).rows[0] == (
        Combine(0, (BufferRole("input", 0),), (mine,), False),
        Signal((1,), 1),
        Wait((1,), 1),
        Combine(0, (mine, yours), (BufferRole("output", 0),), True),
    )


@pytest.mark.parametrize("num_ranks", RANKS)
def test_waits_and_bytes_are_those_of_the_table(num_ranks: int) -> None:
    p = num_ranks
    expected = {
        "one_shot": (1, p - 1),
        "two_shot": (2, (p - 1) / p),
        "chain": (2, (p - 1) / p),
        "ring": (2 * p - 1, 2 * (p - 1) / p),
    }
    for name, (num_waits, fraction) in expected.items():
        protocol = flag_all_reduce.PROTOCOLS[name](p)
        assert waits(protocol) == (num_waits if p > 1 else 0), name
        assert fraction_from_others(protocol, 0) == pytest.approx(fraction), name
        assert protocol.uses_slots == (name == "one_shot")


@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_rank_of_the_ring_accesses_only_its_left_hand_neighbour(num_ranks: int) -> None:
    for rank in range(num_ranks):
        reached = {
            place.rank
            for row in combines(flag_all_reduce.ring(num_ranks), rank)
            for place in (*row.sources, *row.targets)
        }
        assert reached <= {rank, (rank - 1) % num_ranks}


@pytest.mark.parametrize("num_ranks", RANKS)
def test_staged_accesses_no_memory_of_others_but_slots(num_ranks: int) -> None:
    for rank in range(num_ranks):
        for row in combines(flag_all_reduce.staged(num_ranks), rank):
            places = (*row.sources, *row.targets)
            assert all(place.memory == "slot" or place.rank == rank for place in places)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_part_is_completed_once_everywhere_it_is_stored(num_ranks: int) -> None:
    for name in ("two_shot", "chain"):
        stored = Counter(
            (row.part, place.rank)
            for rank in range(num_ranks)
            for row in combines(flag_all_reduce.PROTOCOLS[name](num_ranks), rank)
            for place in row.targets
            if row.completes
        )
        assert stored == Counter((p, r) for p in range(num_ranks) for r in range(num_ranks))


def test_ranks_that_wait_for_each_other_have_no_order() -> None:
    rows = tuple((Wait((1 - rank,), 1), Signal((1 - rank,), 1)) for rank in range(2))
    with pytest.raises(ValueError, match="waits for another"):
        list(Protocol("stuck", 2, 1, rows).in_order())
