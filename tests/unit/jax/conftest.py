"""Eight CPU devices of JAX, with numbers of 64 bits or without."""

from __future__ import annotations

import os

import pytest

_FLAG = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="session")
def jax():
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}"
    found = pytest.importorskip("jax")
    if len(found.devices("cpu")) < 8:
        pytest.skip("another test of this process has started JAX with fewer devices")
    return found


@pytest.fixture(params=[False, True], ids=["32 bits", "64 bits"])
def x64(jax, request):
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def tpus(jax):
    """Return a function that makes a strategy of so many CPU devices of JAX."""
    import dvkernels as dv

    made = []

    def make(count=2, **options):
        made.append(dv.TPUStrategy([f"jax:cpu:{k}" for k in range(count)], **options))
        return made[-1]

    yield make
    for strategy in made:
        strategy.close()
