"""Cost models: monotonicity, crossovers, and the constants that calibration finds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvkernels.benchmarks import network_calibration
from dvkernels.benchmarks.stopwatch import Samples
from dvkernels.schedules import cost_model

SIZES = [4 << k for k in range(0, 27, 2)]


@pytest.mark.parametrize("asleep", [False, True])
def test_sharing_pays_from_where_both_take_the_same_time(asleep: bool) -> None:
    machine = cost_model.CPU
    moved = machine.sharing_pays_from(asleep)
    extra = machine.join_seconds + machine.wake_seconds * asleep
    alone, shared = moved / machine.rate_of_one, extra + moved / machine.rate_of_all
    assert alone == pytest.approx(shared, rel=1e-3)


LINK = cost_model.Link(10e-6, 1e9)


def test_between_workers_more_bytes_and_more_workers_never_cost_less() -> None:
    models = [
        lambda count, nbytes: cost_model.memory_seconds(LINK, count, nbytes),
        lambda count, nbytes: cost_model.message_seconds(LINK, count, count, nbytes),
    ]
    for seconds in models:
        by_size = [seconds(4, nbytes) for nbytes in SIZES]
        assert by_size == sorted(by_size)
    for seconds in models[1:]:
        by_count = [seconds(count, 1 << 20) for count in range(2, 65)]
        assert by_count == sorted(by_count)


@pytest.mark.parametrize("count", [2, 3, 4, 64])
def test_workers_that_share_memory_move_no_more_than_six_times_their_bytes(count: int) -> None:
    moved = cost_model.memory_seconds(cost_model.Link(0.0, 1.0), count, 1)
    assert 5 <= moved <= min(6, count + 3)


@pytest.mark.parametrize("num_hosts", [1, 3])
@pytest.mark.parametrize("link", [cost_model.Link(5e-6, 20e9), cost_model.Link(1e-4, 1e8)])
def test_calibration_finds_the_constants_that_made_the_times(
    num_hosts: int, link: cost_model.Link
) -> None:
    times = {
        nbytes: Samples((network_calibration.modelled(3, num_hosts, link, nbytes),) * 3)
        for nbytes in network_calibration.SIZES
    }
    assert network_calibration.fit(3, num_hosts, times) == pytest.approx(link, rel=1e-6)


@pytest.mark.parametrize(("num_workers", "num_hosts"), [(2, 2), (4, 2), (4, 4), (64, 8)])
def test_between_hosts_short_arrays_are_gathered_and_long_ones_exchanged(num_workers, num_hosts):
    ways = [
        cost_model.between_hosts(cost_model.NETWORK, num_workers, num_hosts, size)
        for size in [0, *SIZES]
    ]
    assert ways == sorted(ways, reverse=True)
    assert {*ways} == {"gather", "exchange"}


NETWORKS = st.builds(
    cost_model.Network,
    *(st.floats(1e-7, 1e-3) for _ in range(3)),
    st.floats(1e7, 1e10),
    st.floats(0.1, 1.0),
    st.just(cost_model.NETWORK.memory_rate),
)
SHAPES = st.sampled_from([(2, 2), (3, 3), (4, 2), (4, 4), (6, 3), (64, 8)])


@given(NETWORKS, SHAPES, st.sampled_from([0, *SIZES]), st.sampled_from([1, 2]))
def test_the_fastest_algorithm_between_hosts_is_chosen(network, shape, nbytes, wider):
    wide = nbytes * wider
    seconds = cost_model.seconds_by_algorithm(network, *shape, nbytes, wide)
    way = cost_model.Routing(network=network).algorithm_for(*shape, nbytes, wide)
    assert seconds[way] == min(seconds.values())
    for named in seconds:
        assert cost_model.Routing(named, network).algorithm_for(*shape, nbytes, wide) == named


@given(NETWORKS, SHAPES, st.sampled_from(SIZES))
def test_a_ring_is_faster_only_under_incast(network, shape, nbytes):
    """And never between two hosts, where each receives from one worker."""
    if shape[1] > 2:
        network = network._replace(incast=1.0)
    seconds = cost_model.seconds_by_algorithm(network, *shape, nbytes)
    assert seconds["exchange"] <= seconds["ring"] * (1 + 1e-9)


def test_a_ring_is_chosen_where_links_are_slow_and_shared():
    shared = cost_model.NETWORK._replace(rate=25e6, incast=0.75)
    ways = [cost_model.between_hosts(shared, 4, 4, size) for size in (4, 1 << 16, 1 << 20, 1 << 23)]
    assert ways == ["gather", "ring", "ring", "ring"]
    alone = shared._replace(incast=1.0)
    assert cost_model.between_hosts(alone, 4, 4, 1 << 23) == "exchange"


@given(NETWORKS, SHAPES)
def test_calibration_finds_the_network_that_made_the_times(network, shape):
    times = {
        size: cost_model.seconds_by_algorithm(network, *shape, size)
        for size in network_calibration.SIZES
    }
    ways = {
        way: {size: Samples((seconds[way],) * 3) for size, seconds in times.items()}
        for way in network_calibration.ALGORITHMS
    }
    found = network_calibration.fit_network(*shape, ways)
    for size, seconds in times.items():
        assert cost_model.seconds_by_algorithm(found, *shape, size) == pytest.approx(
            seconds, rel=1e-3
        )


def test_workers_that_share_a_host_save_what_passes_between_hosts() -> None:
    slow = cost_model.NETWORK._replace(rate=1e9)
    assert cost_model.exchange_seconds(slow, 8, 2, 1 << 26) < cost_model.exchange_seconds(
        slow, 8, 8, 1 << 26
    )
