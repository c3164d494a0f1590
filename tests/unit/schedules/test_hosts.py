"""Every part reaches its worker once from each host, and each host once from its worker."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis.strategies import integers, lists

from dvkernels.schedules import hosts

placements = lists(integers(0, 4), min_size=1, max_size=12).map(hosts.numbered)


@given(placements)
def test_each_part_has_one_door_to_each_host(placed):
    every = [hosts.roles(placed, worker) for worker in range(len(placed))]
    for worker, mine in enumerate(every):
        assert mine.host == placed[worker]
        assert [placed[door] for door in mine.doors] == [*range(max(placed) + 1)]
        assert mine.doors[mine.host] == worker
        for other, theirs in enumerate(every):
            assert (other in mine.carried) == (worker in theirs.doors)


@given(placements)
def test_what_hosts_add_up_is_the_sum_of_all(placed):
    for part in range(len(placed)):
        total = Counter()
        for door in hosts.roles(placed, part).doors:
            total += Counter(w for w, host in enumerate(placed) if host == placed[door])
        assert total == Counter(range(len(placed)))


@given(integers(1, 4), integers(1, 4))
def test_doors_are_dealt_out_evenly(num_hosts, num_members):
    placed = [host for host in range(num_hosts) for _ in range(num_members)]
    for worker in range(len(placed)):
        assert len(hosts.roles(placed, worker).carried) == num_hosts
