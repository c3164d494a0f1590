"""The tables of the page on scaling are those of the cost model, and fit published results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvkernels.benchmarks import scaling

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
