"""The tables of the page on scaling are those of the cost model, and fit published results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peers import scaling

from dvkernels.schedules.cost_model import Link

PAGES = Path(__file__).resolve().parents[2] / "docs" / "explanation"
PAGE = (PAGES / "scaling.md").read_text(encoding="utf-8")
RUNS = json.loads((PAGES / "data" / "between-workers.json").read_text(encoding="utf-8"))["runs"]


@pytest.mark.parametrize("name", scaling.tables(RUNS))
def test_the_page_shows_the_tables_of_the_code(name):
    assert scaling.tables(RUNS)[name] in PAGE


def test_horovods_published_efficiencies_lie_within_the_predicted_range():
    for result in scaling.PUBLISHED:
        if result.by != "Horovod":
            continue
        cluster = scaling.CLUSTERS[result.cluster]
        networks = scaling.NETWORKS[result.cluster]
        (network,) = (each for each in networks if each.name == result.network)
        low, high = (
            scaling.efficiency(network, cluster, result.num_ranks, "ring", is_hidden=hidden)
            for hidden in (False, True)
        )
        assert low <= result.efficiency <= high


def test_efficiency_never_rises_with_the_number_of_ranks():
    for key, cluster in scaling.CLUSTERS.items():
        for network in scaling.NETWORKS[key]:
            for schedule in scaling.SCHEDULES:
                for hidden in (False, True):
                    efficiencies = [
                        scaling.efficiency(network, cluster, count, schedule, is_hidden=hidden)
                        for count in scaling.RANKS
                    ]
                    assert efficiencies == sorted(efficiencies, reverse=True)
                    assert 0 < efficiencies[-1] <= efficiencies[0] <= 1


@pytest.mark.parametrize("count", [2, 3, 64])
def test_a_ring_takes_longer_for_more_ranks_and_bytes(count):
    link = Link(5e-6, 1e9)
    small, large = (scaling.network_ring_seconds(link, count, n) for n in (1 << 10, 1 << 20))
    assert small < large < scaling.network_ring_seconds(link, count + 1, 1 << 20)


@pytest.mark.parametrize("count", [2, 3, 64])
def test_a_ring_sends_the_least_possible_and_takes_its_steps(count: int) -> None:
    least = 2 * (count - 1) / count * 1e9
    no_latency, no_bytes = Link(0.0, 1e9), Link(1e-6, 1e9)
    assert scaling.network_ring_seconds(no_latency, count, 10**9) == pytest.approx(least / 1e9)
    steps = 2 * (count - 1)
    assert scaling.network_ring_seconds(no_bytes, count, 0, 5) == pytest.approx(5 * steps * 1e-6)


@pytest.mark.parametrize("reduce", [0.0, 0.5, 1.0, 3.0])
def test_a_step_waits_for_the_rest_of_the_reduction(reduce: float) -> None:
    waited = [scaling.step_seconds(1.0, reduce, part) for part in (1.0, 2 / 3, 0.0)]
    assert waited == sorted(waited)
    assert waited[-1] == 1.0 + reduce
    assert waited[0] == max(1.0, reduce)
