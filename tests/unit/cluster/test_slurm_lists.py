"""Slurm's lists of nodes and counts, in every form that Slurm prints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvkernels.cluster.slurm_lists import expand_counts, expand_nodes
from dvkernels.errors import ClusterError


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n1", "n1"),
        ("n[1-2],m5,o[3-4,6,7-9]", "n1 n2 m5 o3 o4 o6 o7 o8 o9"),
        ("gnode[08-11]", "gnode08 gnode09 gnode10 gnode11"),
        ("n[9-11]", "n9 n10 n11"),
        ("n[001,3]-ib.x.org", "n001-ib.x.org n3-ib.x.org"),
        ("r[0-1]n[0-2]", "r0n0 r0n1 r0n2 r1n0 r1n1 r1n2"),
        ("a-b,c_d", "a-b c_d"),
    ],
)
def test_nodes(text, nodes):
    assert expand_nodes("V", text) == nodes.split()


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 20)), min_size=1, max_size=5))
def test_ranges_expand_to_their_numbers(ranges):
    text = ",".join(f"{low}-{low + more}" for low, more in ranges)
    expected = [f"n{k}" for low, more in ranges for k in range(low, low + more + 1)]
    assert expand_nodes("V", f"n[{text}]") == expected


@pytest.mark.parametrize(
    "text",
    ["", ",", "n1,", ",n1", "n[1", "n1]", "n[]", "n[1-]", "n[2-1]", "n[a]", "n1 n2", "n[1--2]"],
)
def test_malformed_lists_of_nodes(text):
    with pytest.raises(ClusterError, match="SLURM_STEP_NODELIST") as caught:
        expand_nodes("SLURM_STEP_NODELIST", text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["n[0-999999999999]", "a[0-999]b[0-999]"])
def test_a_typing_error_does_not_fill_the_memory(text):
    with pytest.raises(ClusterError, match="more than 131072 nodes"):
        expand_nodes("V", text)


@pytest.mark.parametrize(
    ("text", "counts"),
    [("3(x2),2,1", [3, 3, 2, 1]), ("4", [4]), ("1(x4)", [1] * 4), ("16,2(x3)", [16, 2, 2, 2])],
)
def test_counts(text, counts):
    assert expand_counts("V", text) == counts


@pytest.mark.parametrize("text", ["", "0", "3x2", "3(x0)", "3(x2", "1,,2", "-1", "2(x9999999)"])
def test_malformed_lists_of_counts(text):
    with pytest.raises(ClusterError, match="SLURM_STEP_TASKS_PER_NODE"):
        expand_counts("SLURM_STEP_TASKS_PER_NODE", text)
