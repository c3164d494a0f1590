"""Slurm's lists of counts, in every form that Slurm prints."""

from __future__ import annotations

import pytest

from dvkernels.cluster.slurm_counts import expand
from dvkernels.errors import ClusterError


@pytest.mark.parametrize(
    ("text", "counts"),
    [("3(x2),2,1", [3, 3, 2, 1]), ("4", [4]), ("1(x4)", [1] * 4), ("16,2(x3)", [16, 2, 2, 2])],
)
def test_counts(text, counts):
    assert expand("V", text) == counts


@pytest.mark.parametrize("text", ["", "0", "3x2", "3(x0)", "3(x2", "1,,2", "-1", "2(x9999999)"])
def test_malformed_lists_of_counts(text):
    with pytest.raises(ClusterError, match="SLURM_STEP_TASKS_PER_NODE"):
        expand("SLURM_STEP_TASKS_PER_NODE", text)
