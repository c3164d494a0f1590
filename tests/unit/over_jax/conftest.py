"""Eight CPU devices of JAX, with numbers of 64 bits or without."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def jax():
    return pytest.importorskip("jax")


@pytest.fixture(params=[False, True], ids=["32 bits", "64 bits"])
def x64(jax, request):
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True)
def narrow(jax, request):
    """Turn numbers of 64 bits off, which tests of other folders turn on."""
    if "x64" in request.fixturenames:
        yield
        return
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


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
