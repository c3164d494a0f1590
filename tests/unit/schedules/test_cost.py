from __future__ import annotations

import pytest

from dvkernels.schedules import cost

SIZES = [4 << k for k in range(0, 27, 2)]


@pytest.mark.parametrize("asleep", [False, True])
def test_sharing_pays_where_both_ways_cost_the_same(asleep: bool) -> None:
    machine = cost.CPU
    moved = machine.sharing_pays_from(asleep)
    extra = machine.join_seconds + machine.wake_seconds * asleep
    alone, shared = moved / machine.rate_of_one, extra + moved / machine.rate_of_all
    assert alone == pytest.approx(shared, rel=1e-3)


@pytest.mark.parametrize("num_replicas", [1, 2, 8, 64])
def test_in_one_memory_domain_the_direct_algorithm_is_never_dearer(num_replicas: int) -> None:
    # The prompt way of kernels/cpu relies on it: it does not ask the model.
    assert {cost.cheapest(cost.CPU, num_replicas, nbytes) for nbytes in SIZES} == {"direct"}


def test_more_bytes_and_more_replicas_never_cost_less() -> None:
    for seconds in (cost.direct_seconds, cost.ring_seconds):
        by_size = [seconds(cost.CPU, 4, nbytes) for nbytes in SIZES]
        by_replicas = [seconds(cost.CPU, count, 1 << 20) for count in range(1, 9)]
        assert by_size == sorted(by_size)
        assert by_replicas == sorted(by_replicas)


@pytest.mark.parametrize(("num_workers", "num_hosts"), [(2, 2), (4, 2), (4, 4), (64, 8)])
def test_between_hosts_short_arrays_are_gathered_and_long_ones_exchanged(num_workers, num_hosts):
    ways = [cost.between_hosts(cost.NETWORK, num_workers, num_hosts, size) for size in [0, *SIZES]]
    assert ways == sorted(ways, reverse=True)
    assert {*ways} == {"gather", "exchange"}


def test_workers_that_share_a_host_save_what_passes_between_hosts() -> None:
    slow = cost.NETWORK._replace(rate=1e9)
    assert cost.exchange_seconds(slow, 8, 2, 1 << 26) < cost.exchange_seconds(slow, 8, 8, 1 << 26)
