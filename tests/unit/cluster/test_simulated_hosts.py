"""The environment variable that divides workers into simulated hosts."""

from __future__ import annotations

import pytest

from dvkernels.cluster import simulated_hosts
from dvkernels.errors import ClusterError


@pytest.mark.parametrize(
    ("said", "expected"), [("2,2", [0, 0, 1, 1]), (" 1, 3 ", [0, 1, 1, 1]), ("4", [0] * 4)]
)
def test_workers_are_assigned_to_hosts_in_order(said, expected):
    assert simulated_hosts.host_of_each_worker({simulated_hosts.VARIABLE: said}, 4) == expected


@pytest.mark.parametrize("said", ["2,1", "2,x", "4,0", "-1,5", ",", "5"])
def test_malformed_values_are_named(said):
    with pytest.raises(ClusterError, match=f"DVKERNELS_HOSTS='{said}'.*4 in all"):
        simulated_hosts.host_of_each_worker({simulated_hosts.VARIABLE: said}, 4)


@pytest.mark.parametrize(
    "environ", [{}, {simulated_hosts.VARIABLE: ""}, {simulated_hosts.VARIABLE: " "}]
)
def test_unset_it_changes_nothing(environ):
    assert simulated_hosts.host_of_each_worker(environ, 4) is None
