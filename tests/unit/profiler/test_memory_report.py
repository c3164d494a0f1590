"""Memory report by device and owner."""

from __future__ import annotations

import copy
import gc
import time

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


def peak_of(device):
    gc.collect()
    return dv.profiler.memory().peak_by_device.get(device, {})


def test_peaks_outlive_what_they_counted(tmp_path):
    with dv.MirroredStrategy(["cpu:50"]) as strategy, strategy.scope():
        one = dv.Variable(np.zeros(1000))
        two = dv.Variable(np.zeros(2000))
        copy.deepcopy(two)
        assert peak_of("cpu:50")["variables"] == 40_000
        one.assign_add(np.ones(1000))
        dv.optimizers.SGD(0.1, momentum=0.9).apply_gradients([(np.ones(2000), two)])
        one = two = None
    assert of("cpu:50") == {}
    most = peak_of("cpu:50")
    assert {name: n for name, n in most.items() if n} == {
        "variables": 40_000, "workspaces": 8000, "slots": 16_000
    }  # fmt: skip
    assert "at most" in str(dv.profiler.memory())


def test_drafts_of_an_update_are_not_counted():
    with dv.MirroredStrategy(["cpu:51", "cpu:51"]) as strategy, strategy.scope():
        weight = dv.Variable(np.zeros(1000))
        strategy.update(weight, lambda copy: copy.assign_add(np.ones(1000)))
        assert of("cpu:51")["variables"] == peak_of("cpu:51")["variables"] == 16_000


def test_prefetched_batches_and_checkpoints(tmp_path):
    data = dv.Dataset.from_arrays(np.zeros((12, 100))).batch(4).prefetch(2)
    before = of("cpu:0").get("prefetch", 0)
    with dv.MirroredStrategy(["cpu:0"]) as strategy:
        batches = iter(strategy.distribute_dataset(data))
        next(batches)
        end = time.monotonic() + 60
        while of("cpu:0").get("prefetch", 0) < before + 2 * 3200 and time.monotonic() < end:
            time.sleep(0.001)
        assert of("cpu:0")["prefetch"] == before + 2 * 3200
        assert sum(1 for _ in batches) == 2
        batches.close()
    assert of("cpu:0").get("prefetch", 0) == before
    array = np.zeros(1_000_000)
    held = of("cpu:0").get("checkpoints", 0)
    with dv.CheckpointManager(dv.Checkpoint(array=array), tmp_path) as manager:
        manager.save(1, background=True)
    assert of("cpu:0")["checkpoints"] == held + array.nbytes
    del manager
    assert of("cpu:0").get("checkpoints", 0) == held
