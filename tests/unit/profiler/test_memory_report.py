"""Memory report by device and owner."""

from __future__ import annotations

import gc

import numpy as np
import psutil

import dvkernels as dv
from dvkernels.profiler.memory_report import OWNERS


def of(device):
    gc.collect()
    return dict(dv.profiler.memory().by_device.get(device, {}))


def test_variables_slots_and_workspaces():
    with dv.MirroredStrategy(["cpu:40", "cpu:41"]) as strategy:
        with strategy.scope():
            weight = dv.Variable(np.zeros(1000), aggregation="mean")
        assert of("cpu:41") == dict.fromkeys(OWNERS, 0) | {"variables": 8000}
        adam = dv.optimizers.Adam(0.1)
        strategy.run(lambda: adam.apply_gradients([(np.ones(1000), weight)]))
        assert of("cpu:41")["slots"] == 16_000
        strategy.run(lambda: weight.assign_add(np.ones(1000)))
        assert of("cpu:40")["workspaces"] == 8000
        assert "cpu:41" in str(dv.profiler.memory())
    kept = weight.numpy(), adam.iterations
    weight = adam = None
    assert of("cpu:41") == {}
    assert kept[1] == 1


def test_process_memory_equals_that_of_the_system():
    report, seen = dv.profiler.memory(), psutil.Process().memory_info().rss
    assert report.process_nbytes is not None
    assert abs(report.process_nbytes - seen) < 0.2 * seen
    assert report.process_peak_nbytes >= 0.8 * seen
    assert report.nbytes == sum(sum(owners.values()) for owners in report.by_device.values())


def test_the_peak_is_at_least_the_current_memory():
    kept = []
    for _ in range(50):
        kept.append(np.ones(100_000))
        report = dv.profiler.memory()
        assert report.process_peak_nbytes >= report.process_nbytes
