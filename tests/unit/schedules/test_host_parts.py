"""Every part reaches its worker from each host, and each host from its worker, both ways once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis.strategies import integers, lists

from dvkernels.schedules import host_parts

placements = lists(integers(0, 4), min_size=1, max_size=12).map(host_parts.numbered)


@given(placements)
def test_each_part_has_one_door_to_each_host(placed):
    every = [host_parts.roles(placed, worker) for worker in range(len(placed))]
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
        for door in host_parts.roles(placed, part).doors:
            total += Counter(w for w, host in enumerate(placed) if host == placed[door])
        assert total == Counter(range(len(placed)))


@given(integers(1, 4), integers(1, 4))
def test_doors_are_dealt_out_evenly(num_hosts, num_members):
    placed = [host for host in range(num_hosts) for _ in range(num_members)]
    for worker in range(len(placed)):
        assert len(host_parts.roles(placed, worker).carried) == num_hosts


@given(placements.filter(lambda placed: max(placed) > 0))
def test_around_the_ring_each_host_adds_once_in_order_and_each_gets_the_result(placed):
    last = max(placed)
    every = [host_parts.ring(placed, worker) for worker in range(len(placed))]
    for part, owner in enumerate(placed):
        stops = {
            stop.place: (worker, stop)
            for worker, mine in enumerate(every)
            for stop in mine
            if stop.part == part
        }
        on_the_way = [stops[place][0] for place in range(last + 1)]
        assert [placed[worker] for worker in on_the_way] == [
            *range(owner + 1, last + 1),
            *range(owner + 1),
        ]
        assert on_the_way[-1] == part
        assert {*on_the_way} == {*host_parts.roles(placed, part).doors}
        for place, (_, stop) in stops.items():
            assert stop.before == on_the_way[place - 1]
            assert stop.after == on_the_way[(place + 1) % (last + 1)]


@given(placements)
def test_a_worker_of_a_ring_begins_with_what_starts_there(placed):
    for worker in range(len(placed)):
        stops = host_parts.ring(placed, worker)
        assert [stop.place for stop in stops] == sorted(stop.place for stop in stops)
        assert [*sorted(stop.part for stop in stops)] == [*host_parts.roles(placed, worker).carried]


def test_of_as_many_workers_each_hears_from_one_only():
    placed = [0, 0, 1, 1, 2, 2, 3, 3]
    for worker in range(len(placed)):
        assert len({stop.before for stop in host_parts.ring(placed, worker)}) == 1
        assert len({*host_parts.roles(placed, worker).doors} - {worker}) == 3  # in an exchange
