"""Traces of a job of two workers, which several tests read."""

from __future__ import annotations

import made_traces
import pytest

import dvkernels as dv


@pytest.fixture(scope="session")
def traces(tmp_path_factory):
    """The traces of two workers with two replicas each: five steps, with two collectives each."""
    folder = tmp_path_factory.mktemp("traces")
    dv.launch(made_traces.job, (folder / "run.json",), workers=2)
    return [folder / "run.worker-0.json", folder / "run.worker-1.json"]
