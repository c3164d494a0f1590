"""A strategy of two workers that are threads, and its coordinator."""

from __future__ import annotations

import pytest

import dvkernels as dv


@pytest.fixture
def strategy():
    with dv.ParameterServerStrategy(num_workers=2) as made:
        yield made


@pytest.fixture
def coordinator(strategy):
    return dv.ClusterCoordinator(strategy)
