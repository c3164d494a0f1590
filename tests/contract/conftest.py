"""Strategies of the contract tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kinds import devices

import dvkernels as dv


@pytest.fixture
def two() -> Iterator[dv.Strategy]:
    with dv.MirroredStrategy(devices(2)) as strategy:
        yield strategy


@pytest.fixture(params=[1, 2, 3])
def strategy(request: pytest.FixtureRequest) -> Iterator[dv.Strategy]:
    """One to three replicas on one device."""
    with dv.MirroredStrategy(["cpu:0"] * request.param) as made:
        yield made
