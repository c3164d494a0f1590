"""The yardstick in C: right on random data, and absent with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from dvkernels.benchmarks import c_probe
from dvkernels.errors import DeviceError

needs_cc = pytest.mark.skipif(bool(c_probe.reason_for_none()), reason="needs a C compiler")


@needs_cc
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("length", [64, 192, 6400])
def test_the_kernel_leaves_the_mean_and_the_touching_pass_every_bit(count, length):
    rng = np.random.default_rng(count)
    buffers = [rng.integers(-99, 99, length).astype(np.float32) for _ in range(count)]
    mean = np.mean(buffers, axis=0, dtype=np.float64).astype(np.float32)
    probe = c_probe.CProbe(buffers)
    assert probe.seconds(1, only_touches=False) > 0
    for buffer in buffers:
        np.testing.assert_allclose(buffer, mean, rtol=1e-5, atol=1e-5)
    bits = [rng.integers(-(2**31), 2**31, length).astype(np.int32) for _ in range(count)]
    before = [each.copy() for each in bits]
    assert c_probe.CProbe(bits).seconds(3, only_touches=True) > 0
    assert all(np.array_equal(one, other) for one, other in zip(bits, before, strict=True))


@needs_cc
@pytest.mark.parametrize("length", [0, 63, 65])
def test_buffers_that_do_not_fit_are_refused(length):
    with pytest.raises(DeviceError, match="whole 256 bytes"):
        c_probe.CProbe([np.zeros(length, np.float32)])


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-cc", "there is no C compiler"), ("false", "cannot compile")]
)
def test_without_a_compiler_the_reason_is_told(compiler, reason, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    c_probe._library.cache_clear()
    try:
        assert reason in c_probe.reason_for_none()
        with pytest.raises(DeviceError, match=reason):
            c_probe.CProbe([np.zeros(64, np.float32)])
        assert reason in c_probe.describe()
    finally:
        c_probe._library.cache_clear()
