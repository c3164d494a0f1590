"""Errors of MultiWorkerMirroredStrategy in a single process without MPI."""

from __future__ import annotations

import sys

import pytest

import dvkernels as dv

TWO = {"worker": ["a:1", "b:1"]}


def test_several_workers_need_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "dvkernels.communicators.workers.connect", raising=False)
    resolver = dv.cluster.SimpleClusterResolver(TWO, task_id=1)
    with pytest.raises(dv.errors.ClusterError, match=r"worker 1 of 2.* install mpi4py"):
        dv.MultiWorkerMirroredStrategy(resolver)


def test_a_task_that_is_not_a_worker():
    resolver = dv.cluster.SimpleClusterResolver(TWO | {"ps": ["c:1"]}, task_type="ps", task_id=0)
    with pytest.raises(dv.errors.ClusterError, match="expected a worker"):
        dv.MultiWorkerMirroredStrategy(resolver)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "soon", None])
def test_a_deadline_is_a_positive_number(seconds):
    with pytest.raises(ValueError, match="timeout_seconds"):
        dv.MultiWorkerMirroredStrategy(timeout_seconds=seconds)


def test_an_object_that_is_not_a_resolver_is_refused():
    with pytest.raises(TypeError, match="ClusterResolver"):
        dv.MultiWorkerMirroredStrategy("localhost:1")


def test_with_one_worker_it_is_a_mirrored_strategy():
    with dv.MultiWorkerMirroredStrategy(
        dv.cluster.SimpleClusterResolver({}), devices=["cpu:0", "cpu:1"]
    ) as strategy:
        assert strategy.num_replicas_in_sync == 2
        assert strategy.cluster_resolver.is_chief
        assert "worker" not in repr(strategy)
