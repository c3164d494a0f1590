"""Long runs and huge datasets take no more memory than short and small ones."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import psutil
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_million_batches_leave_memory_flat(count):
    data = Dataset.from_arrays((np.zeros((1024, 8), np.float32), np.arange(1024)))
    batches = iter(DistributedDataset(data.shuffle(seed=1).repeat().batch(2), 2))
    for _ in range(20_000):
        next(batches)
    before = resident()
    for _ in range(count - 20_000):
        next(batches)
    assert resident() - before < 4 << 20
    assert batches.state_dict()["position"] == count


def test_a_trillion_elements_shuffle_and_resume_in_constant_memory():
    data = Dataset.range(10**12).shuffle(seed=3).batch(4)
    tracemalloc.start()
    try:
        first = iter(DistributedDataset(data, 2))
        first.load_state_dict(first.state_dict() | {"position": 10**11 + 7})
        seen = [int(x) for _ in range(50) for part in next(first).values for x in part]
        state = first.state_dict()
        after = [int(x) for _ in range(50) for part in next(first).values for x in part]
        again = iter(DistributedDataset(data, 3))
        again.load_state_dict(state)
        same = [int(x) for _ in range(50) for part in next(again).values for x in part]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert same == after
    assert len({*seen, *after}) == 400
    assert max(seen) > 10**11
    assert peak < 1 << 20
