"""Thread pool: kernels work with any number of helper threads."""

from __future__ import annotations

import numpy as np
import pytest

from dvkernels import kernels
from dvkernels.kernels.cpu.engine import thread_pool
from dvkernels.threads import thread


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
@pytest.mark.parametrize("num_begun", [0, 1, 2])
def test_kernels_compute_with_as_many_helpers_as_there_are(monkeypatch, error, num_begun) -> None:
    def start_some(helpers):
        start(helpers[:num_begun])
        raise error

    start, before = thread.start, thread_pool._pool
    monkeypatch.setenv("DVKERNELS_NUM_THREADS", "4")
    kernels.all_reduce([np.ones(1 << 20), np.ones(1 << 20)])  # compiled
    monkeypatch.setattr(thread_pool, "_pool", thread_pool._Pool())
    with monkeypatch.context() as patch:
        patch.setattr(thread, "start", start_some)
        thread_pool._pool._start()
    assert len(thread_pool._pool.wake_locks) == len(thread_pool._pool.threads) == num_begun
    for _ in range(3):
        buffers = [np.ones(1 << 20), np.ones(1 << 20)]
        kernels.all_reduce(buffers)
        thread_pool.wake()
        assert all((buffer == 2).all() for buffer in buffers)
    assert thread_pool._pool is not before


def test_a_helper_recovers_from_a_lost_wake_up(monkeypatch) -> None:
    monkeypatch.setenv("DVKERNELS_NUM_THREADS", "2")
    monkeypatch.setattr(thread_pool, "_RECHECK_SECONDS", 0.01)
    monkeypatch.setattr(thread_pool, "_pool", thread_pool._Pool())
    thread_pool.wake()
    lone, address = thread_pool._pool, thread_pool._pool.address
    while not lone.words[8]:  # it sleeps
        pass
    assert thread_pool._mark_awake(address, 0)  # an interrupt came before the release of its lock
    while not lone.words[8]:  # it has woken by its timeout, and sleeps again
        pass
    thread_pool.wake()
