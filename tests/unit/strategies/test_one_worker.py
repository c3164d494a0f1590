"""What MultiWorkerMirroredStrategy says where it cannot have other workers."""

from __future__ import annotations

import sys

import pytest

import dvkernels as dv

TWO = {"worker": ["a:1", "b:1"]}


def test_without_mpi4py_other_workers_are_out_of_reach(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "dvkernels.communicators.workers.connect", raising=False)
    resolver = dv.cluster.SimpleClusterResolver(TWO, task_id=1)
    with pytest.raises(dv.errors.ClusterError, match=r"worker 1 of 2.* install mpi4py"):
        dv.MultiWorkerMirroredStrategy(resolver)


def test_a_task_that_is_no_worker():
    resolver = dv.cluster.SimpleClusterResolver(TWO | {"ps": ["c:1"]}, task_type="ps", task_id=0)
    with pytest.raises(dv.errors.ClusterError, match="expected a worker"):
        dv.MultiWorkerMirroredStrategy(resolver)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "soon", None])
def test_a_deadline_is_a_positive_number(seconds):
    with pytest.raises(ValueError, match="timeout_seconds"):
        dv.MultiWorkerMirroredStrategy(timeout_seconds=seconds)


def test_a_resolver_is_one():
    with pytest.raises(TypeError, match="ClusterResolver"):
        dv.MultiWorkerMirroredStrategy("localhost:1")


def test_alone_it_is_a_mirrored_strategy():
    with dv.MultiWorkerMirroredStrategy(
        dv.cluster.SimpleClusterResolver({}), devices=["cpu:0", "cpu:1"]
    ) as strategy:
        assert strategy.num_replicas_in_sync == 2
        assert strategy.cluster_resolver.is_chief
        assert "worker" not in repr(strategy)
