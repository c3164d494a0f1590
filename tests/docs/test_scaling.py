"""The page on scaling says what the cost model says, and the model what it is said to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvkernels.benchmarks import scaling

PAGES = Path(__file__).resolve().parents[2] / "docs" / "explanation"
PAGE = (PAGES / "scaling.md").read_text(encoding="utf-8")
RUNS = json.loads((PAGES / "data" / "between-workers.json").read_text(encoding="utf-8"))["runs"]


@pytest.mark.parametrize("name", scaling.tables(RUNS))
def test_the_page_has_the_tables_of_the_code(name):
    assert scaling.tables(RUNS)[name] in PAGE


def test_what_horovod_measured_lies_in_the_span():
    for one in scaling.PUBLISHED:
        if one.by != "Horovod":
            continue
        cluster = scaling.CLUSTERS[one.cluster]
        (network,) = (each for each in scaling.NETWORKS[one.cluster] if each.name == one.network)
        low, high = (
            scaling.efficiency(network, cluster, one.num_ranks, "ring", is_hidden=hidden)
            for hidden in (False, True)
        )
        assert low <= one.efficiency <= high


def test_more_ranks_never_reach_more_of_their_speed():
    for key, cluster in scaling.CLUSTERS.items():
        for network in scaling.NETWORKS[key]:
            for schedule in scaling.SCHEDULES:
                for hidden in (False, True):
                    parts = [
                        scaling.efficiency(network, cluster, count, schedule, is_hidden=hidden)
                        for count in scaling.RANKS
                    ]
                    assert parts == sorted(parts, reverse=True)
                    assert 0 < parts[-1] <= parts[0] <= 1
