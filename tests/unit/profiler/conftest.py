"""Traces of a job of two workers, which several tests read."""

from __future__ import annotations

import numpy as np
import pytest

import dvkernels as dv


def job(path):
    """Record the trace of a worker."""
    with dv.MultiWorkerMirroredStrategy(devices=["cpu:0"] * 2) as strategy:

        def step():
            dv.get_replica_context().all_reduce("sum", np.ones(1000))
            dv.get_replica_context().barrier()

        strategy.run(step)
        with dv.profiler.trace(path):
            for _ in range(5):
                strategy.run(step)


@pytest.fixture(scope="session")
def traces(tmp_path_factory):
    """The traces of two workers with two replicas each: five steps, with two collectives each."""
    folder = tmp_path_factory.mktemp("traces")
    dv.launch(job, (folder / "run.json",), workers=2)
    return [folder / "run.worker-0.json", folder / "run.worker-1.json"]
