from __future__ import annotations

import pytest

from dvkernels.benchmarks import between_workers
from dvkernels.benchmarks.stopwatch import Samples
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


LINK = cost.Link(10e-6, 1e9)


def test_between_workers_more_bytes_and_more_workers_never_cost_less() -> None:
    models = [
        lambda count, nbytes: cost.memory_seconds(LINK, count, nbytes),
        lambda count, nbytes: cost.message_seconds(LINK, count, count, nbytes),
        lambda count, nbytes: cost.network_ring_seconds(LINK, count, nbytes),
    ]
    for seconds in models:
        by_size = [seconds(4, nbytes) for nbytes in SIZES]
        assert by_size == sorted(by_size)
    for seconds in models[1:]:
        by_count = [seconds(count, 1 << 20) for count in range(2, 65)]
        assert by_count == sorted(by_count)


@pytest.mark.parametrize("count", [2, 3, 4, 64])
def test_workers_that_share_memory_move_no_more_than_six_times_their_bytes(count: int) -> None:
    moved = cost.memory_seconds(cost.Link(0.0, 1.0), count, 1)
    assert 5 <= moved <= min(6, count + 3)


@pytest.mark.parametrize("count", [2, 3, 64])
def test_a_ring_sends_the_least_possible_and_takes_its_steps(count: int) -> None:
    least = 2 * (count - 1) / count * 1e9
    no_latency, no_bytes = cost.Link(0.0, 1e9), cost.Link(1e-6, 1e9)
    assert cost.network_ring_seconds(no_latency, count, 10**9) == pytest.approx(least / 1e9)
    steps = 2 * (count - 1)
    assert cost.network_ring_seconds(no_bytes, count, 0, 5) == pytest.approx(5 * steps * 1e-6)


@pytest.mark.parametrize("reduce", [0.0, 0.5, 1.0, 3.0])
def test_a_step_waits_for_what_is_not_hidden(reduce: float) -> None:
    waited = [cost.step_seconds(1.0, reduce, part) for part in (1.0, 2 / 3, 0.0)]
    assert waited == sorted(waited)
    assert waited[-1] == 1.0 + reduce
    assert waited[0] == max(1.0, reduce)


@pytest.mark.parametrize("num_hosts", [1, 3])
@pytest.mark.parametrize("link", [cost.Link(5e-6, 20e9), cost.Link(1e-4, 1e8)])
def test_calibration_finds_the_constants_that_made_the_times(
    num_hosts: int, link: cost.Link
) -> None:
    times = {
        nbytes: Samples((between_workers.modelled(3, num_hosts, link, nbytes),) * 3)
        for nbytes in between_workers.SIZES
    }
    assert between_workers.fit(3, num_hosts, times) == pytest.approx(link, rel=1e-6)


@pytest.mark.parametrize(("num_workers", "num_hosts"), [(2, 2), (4, 2), (4, 4), (64, 8)])
def test_between_hosts_short_arrays_are_gathered_and_long_ones_exchanged(num_workers, num_hosts):
    ways = [cost.between_hosts(cost.NETWORK, num_workers, num_hosts, size) for size in [0, *SIZES]]
    assert ways == sorted(ways, reverse=True)
    assert {*ways} == {"gather", "exchange"}


def test_workers_that_share_a_host_save_what_passes_between_hosts() -> None:
    slow = cost.NETWORK._replace(rate=1e9)
    assert cost.exchange_seconds(slow, 8, 2, 1 << 26) < cost.exchange_seconds(slow, 8, 8, 1 << 26)
