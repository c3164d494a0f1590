"""Selection of the protocol of a reduction between devices."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvkernels.schedules import flag_all_reduce, flag_selection
from dvkernels.schedules.flag_protocol import Combine

SMALL, LARGE = 4096, 1 << 28


def pairs(num_ranks: int, reaching: set[tuple[int, int]]) -> list[list[bool]]:
    ranks = range(num_ranks)
    return [[r == q or (r, q) in reaching for q in ranks] for r in ranks]


def everyone(num_ranks: int) -> list[list[bool]]:
    return [[True] * num_ranks for _ in range(num_ranks)]


reaches = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=n, max_size=n).map(
        lambda rows: [[r == q or row[q] for q in range(n)] for r, row in enumerate(rows)]
    )
)


@given(
    reaches,
    st.sampled_from([SMALL, LARGE]),
    st.sampled_from(["auto", "direct", "ring"]),
    st.booleans(),
    st.booleans(),
)
def test_no_route_needs_access_that_a_device_lacks(
    reach: list[list[bool]], nbytes: int, algorithm: str, is_half: bool, buffers_reachable: bool
) -> None:
    num_ranks = len(reach)
    route = flag_selection.choose(
        reach,
        range(num_ranks),
        nbytes,
        algorithm,
        is_half=is_half,
        buffers_reachable=buffers_reachable,
    )
    assert sorted(route.order) == [*range(num_ranks)]
    for place, rows in enumerate(route.make(num_ranks).rows):
        rank = route.order[place]
        for row in rows:
            places = (*row.sources, *row.targets) if isinstance(row, Combine) else ()
            for memory, other in places:
                owner = route.order[other]
                if memory == "slot":
                    assert route.slots == "host" or reach[rank][owner]
                else:
                    assert reach[rank][owner]
                    assert buffers_reachable or owner == rank
    if route.waits:  # flags lie in memory of their readers
        for place, rows in enumerate(route.make(num_ranks).rows):
            signalled = {peer for row in rows if not isinstance(row, Combine) for peer in row.ranks}
            assert all(reach[route.order[place]][route.order[peer]] for peer in signalled)


@given(reaches)
def test_a_ring_is_found_where_there_is_one(reach: list[list[bool]]) -> None:
    ranks = range(len(reach))

    def is_ring(order: tuple[int, ...]) -> bool:
        return all(reach[rank][order[place - 1]] for place, rank in enumerate(order))

    found = flag_selection.ring_order(reach)
    assert (found is not None) == any(map(is_ring, itertools.permutations(ranks)))
    assert found is None or is_ring(found)


@pytest.mark.parametrize(
    ("nbytes", "algorithm", "is_half", "expected"),
    [
        (SMALL, "auto", False, flag_all_reduce.one_shot),
        (LARGE, "auto", True, flag_all_reduce.two_shot),
        (LARGE, "direct", False, flag_all_reduce.two_shot),
        (SMALL, "ring", False, flag_all_reduce.ring),
        (LARGE, "ring", True, flag_all_reduce.chain),
    ],
)
def test_routes_with_full_peer_access(
    nbytes: int, algorithm: str, is_half: bool, expected: object
) -> None:
    route = flag_selection.choose(everyone(4), range(4), nbytes, algorithm, is_half=is_half)
    assert route == (expected, (0, 1, 2, 3), True, "device")


def test_two_ranks_on_one_device_never_wait_for_each_other() -> None:
    assert not flag_selection.choose(everyone(3), (0, 1, 0), LARGE).waits


def test_without_peer_access_data_goes_through_the_host() -> None:
    route = flag_selection.choose(pairs(3, set()), range(3), LARGE)
    assert route == (flag_all_reduce.staged, (0, 1, 2), False, "host")


def test_neighbours_with_access_form_a_ring_unless_its_bits_differ() -> None:
    reach = pairs(3, {(0, 2), (2, 1), (1, 0)})
    assert flag_selection.choose(reach, range(3), LARGE) == (
        flag_all_reduce.ring,
        (0, 1, 2),
        False,
        "device",
    )
    assert flag_selection.choose(reach, range(3), LARGE, "direct").make is flag_all_reduce.staged
    assert (
        flag_selection.choose(reach, range(3), LARGE, "ring", is_half=True).make
        is flag_all_reduce.staged
    )
