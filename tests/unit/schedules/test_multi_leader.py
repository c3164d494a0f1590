"""Laws of the hierarchical all-reduce: gateways, parts, and the ring of hosts."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis.strategies import integers, lists

from dvkernels.schedules import multi_leader

placements = lists(integers(0, 4), min_size=1, max_size=12).map(multi_leader.host_numbers)


@given(placements)
def test_each_part_has_one_gateway_to_each_host(placed):
    every = [multi_leader.roles(placed, worker) for worker in range(len(placed))]
    for worker, own in enumerate(every):
        assert own.host == placed[worker]
        assert [placed[gateway] for gateway in own.gateways] == [*range(max(placed) + 1)]
        assert own.gateways[own.host] == worker
        for other, other_roles in enumerate(every):
            assert (other in own.parts) == (worker in other_roles.gateways)


@given(placements)
def test_the_gateways_of_a_part_reduce_every_worker_once(placed):
    for part in range(len(placed)):
        total = Counter()
        for gateway in multi_leader.roles(placed, part).gateways:
            total += Counter(w for w, host in enumerate(placed) if host == placed[gateway])
        assert total == Counter(range(len(placed)))


@given(integers(1, 4), integers(1, 4))
def test_gateways_are_assigned_evenly(num_hosts, num_members):
    placed = [host for host in range(num_hosts) for _ in range(num_members)]
    for worker in range(len(placed)):
        assert len(multi_leader.roles(placed, worker).parts) == num_hosts


@given(placements.filter(lambda placed: max(placed) > 0))
def test_around_the_ring_each_host_adds_once_in_order_and_each_gets_the_result(placed):
    last = max(placed)
    every = [multi_leader.ring(placed, worker) for worker in range(len(placed))]
    for part, owner in enumerate(placed):
        hops = {
            hop.position: (worker, hop)
            for worker, own in enumerate(every)
            for hop in own
            if hop.part == part
        }
        path = [hops[position][0] for position in range(last + 1)]
        assert [placed[worker] for worker in path] == [
            *range(owner + 1, last + 1),
            *range(owner + 1),
        ]
        assert path[-1] == part
        assert {*path} == {*multi_leader.roles(placed, part).gateways}
        for position, (_, hop) in hops.items():
            assert hop.source == path[position - 1]
            assert hop.target == path[(position + 1) % (last + 1)]


@given(placements)
def test_the_hops_of_a_worker_are_in_the_order_of_their_positions(placed):
    for worker in range(len(placed)):
        hops = multi_leader.ring(placed, worker)
        assert [hop.position for hop in hops] == sorted(hop.position for hop in hops)
        assert [*sorted(hop.part for hop in hops)] == [*multi_leader.roles(placed, worker).parts]


def test_with_equal_hosts_a_worker_receives_from_one_worker_around_the_ring():
    placed = [0, 0, 1, 1, 2, 2, 3, 3]
    for worker in range(len(placed)):
        assert len({hop.source for hop in multi_leader.ring(placed, worker)}) == 1
        assert len({*multi_leader.roles(placed, worker).gateways} - {worker}) == 3  # in an exchange
