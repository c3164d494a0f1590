"""Cluster specifications: lookup, equality, and malformed input."""

from __future__ import annotations

import pytest

from dvkernels.cluster.spec import ClusterSpec, host_of
from dvkernels.errors import ClusterError


def test_addresses_are_returned_as_given():
    jobs = {"worker": ["a:1", "b:1"], "ps": {3: "c:1", 1: "d:1"}}
    spec = ClusterSpec(jobs)
    assert spec.as_dict() == {"worker": {0: "a:1", 1: "b:1"}, "ps": {1: "d:1", 3: "c:1"}}
    assert spec.jobs == ("worker", "ps")
    assert spec.task_indices("ps") == (1, 3)
    assert spec.job_tasks("ps") == ("d:1", "c:1")
    assert spec.task_address("ps", 3) == "c:1"
    assert (spec.num_tasks("worker"), spec.num_tasks("chief")) == (2, 0)
    assert repr(spec) == "ClusterSpec({'worker': ['a:1', 'b:1'], 'ps': {1: 'd:1', 3: 'c:1'}})"


def test_equal_content_is_equal():
    spec = ClusterSpec({"worker": ["a", "b"]})
    same = ClusterSpec({"worker": {1: "b", 0: "a"}})
    assert spec == same == ClusterSpec(spec)
    assert hash(spec) == hash(same)
    assert spec != ClusterSpec({"worker": ["b", "a"]})


def test_later_changes_of_the_argument_have_no_effect():
    tasks = ["a", "b"]
    spec = ClusterSpec({"worker": tasks})
    tasks.append("c")
    spec.as_dict()["worker"][7] = "x"
    assert spec.job_tasks("worker") == ("a", "b")


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        (["a:1"], "a mapping from a job's name"),
        ({"": ["a:1"]}, "a job's name is a string"),
        ({"worker": "a:1"}, "job 'worker': expected a list of addresses"),
        ({"worker": [7]}, "job 'worker', task 0: expected an address"),
        ({"worker": ["a b"]}, "got 'a b'"),
        ({"worker": {-1: "a"}}, "a task's index is an integer from 0; got -1"),
        ({"worker": {"0": "a"}}, "got '0'"),
        ({"worker": {True: "a"}}, "got True"),
        ({"worker": ["a:1", "b:1"], "ps": ["b:1"]}, "worker 1 and ps 0 both have 'b:1'"),
    ],
)
def test_malformed_input_is_named(jobs, message):
    with pytest.raises(ClusterError, match=message):
        ClusterSpec(jobs)


def test_a_task_that_does_not_exist():
    with pytest.raises(ClusterError, match=r"there is no ps 0 in ClusterSpec\(\{'worker'"):
        ClusterSpec({"worker": ["a"]}).task_address("ps", 0)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("n1:22", "n1"),
        ("n1", "n1"),
        ("[::1]:22", "[::1]"),
        ("[fe80::7]", "[fe80::7]"),
        ("fe80::7", "fe80::7"),
        ("10.0.0.1:80", "10.0.0.1"),
    ],
)
def test_hosts(address, host):
    assert host_of(address) == host
