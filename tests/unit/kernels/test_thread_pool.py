"""Thread pool: kernels work with any number of helper threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dvkernels import kernels
from dvkernels.kernels import checks
from dvkernels.kernels.cpu.engine import gate, job, job_layout, loops, thread_pool
from dvkernels.reduce_op import ReduceOp
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
    monkeypatch.setattr(thread_pool, "_pool", thread_pool.ThreadPool())
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


@pytest.mark.parametrize("length", [100, 1 << 20])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_leaves_a_job_done_with_its_copies_or_not_begun(monkeypatch, length, moment):
    """Transposed arrays are staged, and copied back after the job."""
    groups = [
        [np.ones((length, 2)).T[:, ::-1] for _ in range(2)],
        [np.ones((2, length)) for _ in range(2)],
    ]
    for name in ("_execute", "run_alone"):
        real = getattr(thread_pool, name)

        def interrupted(*args, real=real):
            if moment == "after":
                real(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(thread_pool, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        kernels.all_reduce_many([*map(list, zip(*groups, strict=True))])
    left = {float(x) for group in groups for array in group for x in array.flat}
    assert left == ({2.0} if moment == "after" else {1.0})


def test_a_helper_recovers_from_a_lost_wake_up(monkeypatch) -> None:
    monkeypatch.setenv("DVKERNELS_NUM_THREADS", "2")
    monkeypatch.setattr(thread_pool, "_RECHECK_SECONDS", 0.01)
    monkeypatch.setattr(thread_pool, "_pool", thread_pool.ThreadPool())
    thread_pool.wake()
    lone, address = thread_pool._pool, thread_pool._pool.address
    while not lone.words[thread_pool._NUM_ASLEEP]:  # it sleeps
        pass
    assert thread_pool._mark_awake(address, 0)  # an interrupt came before the release of its lock
    while not lone.words[thread_pool._NUM_ASLEEP]:  # it has woken by its timeout, and sleeps again
        pass
    thread_pool.wake()


def test_a_thread_that_waits_at_a_gate_joins_jobs(monkeypatch) -> None:
    monkeypatch.setattr(thread_pool, "_pool", pool := thread_pool.ThreadPool())
    monkeypatch.setattr(thread, "start", lambda threads: None)  # no helpers
    pool._start()
    state = gate.new_state(1)
    with ThreadPoolExecutor(1) as executor:
        opened = executor.submit(gate.await_gate, state, -1, 0, 1 << 40, pool.address)
        while not pool.words[thread_pool._NUM_GUESTS]:
            pass
        num_joined = 0
        while num_joined < 2:
            buffers = [np.ones(1 << 20), np.ones(1 << 20)]
            words = job.lay_out_sum(buffers, 1 << 10, loops.runner(ReduceOp.SUM, np.dtype(float)))
            thread_pool.execute(words, checks.address(words), thread_pool.SHARED_NBYTES)
            num_joined = words[job_layout.first_counter(words, checks.address(words))]
            assert all((buffer == 2).all() for buffer in buffers)
        gate.open_gate(state, 0)
        assert opened.result(60)
    assert pool.words[thread_pool._NUM_GUESTS] == 0
