"""The concurrent simulator: blocks, launches and streams run at the same time, and end."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("runs in the CUDA simulator: NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from concurrency import concurrent
from numba import cuda

pytestmark = pytest.mark.cuda


@cuda.jit(device=True)
def await_word(words, index, value):
    while words[index] < value:
        pass


@cuda.jit
def exchange_words(words, mine, other):
    """Exchange signals with the same block of another launch, three times."""
    block = cuda.blockIdx.x
    for turn in range(3):
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            words[mine + block] = turn + 1
            await_word(words, other + block, turn + 1)
        cuda.syncthreads()


@cuda.jit
def wait_for_next_block(words):
    """Let each block wait for the next one, which hangs where blocks run one after another."""
    block = cuda.blockIdx.x
    if cuda.threadIdx.x == 0:
        if block + 1 < cuda.gridDim.x:
            await_word(words, block + 1, 1)
        words[block] = 1


@cuda.jit
def exchange_shared(words):
    scratch = cuda.shared.array(4, np.int64)
    me = cuda.threadIdx.x
    scratch[me] = cuda.blockIdx.x * 10 + me
    total = cuda.syncthreads_count(me < 3)
    words[cuda.grid(1)] = scratch[(me + 1) % 4] + 100 * total


@cuda.jit
def add(words, value):
    for index in range(cuda.grid(1), words.size, cuda.gridsize(1)):
        words[index] = words[index] * 2 + value


@cuda.jit
def fail(words):
    if cuda.threadIdx.x == 1:
        raise ValueError("one thread fails")
    cuda.syncthreads()


def test_blocks_wait_for_blocks():
    words = np.zeros(5, np.int64)
    with concurrent():
        wait_for_next_block[5, 2](words)
    assert words.all()


@pytest.mark.parametrize("seed", range(3))
def test_launches_wait_for_launches(seed):
    words = np.zeros(6, np.int64)
    with concurrent(seed) as streams:
        for mine, other in ((0, 3), (3, 0)):
            exchange_words[3, 2, cuda.stream()](words, mine, other)
    assert (words == 3).all()
    assert streams.num_launches == 2


def test_every_block_has_its_own_shared_memory():
    words = np.zeros(12, np.int64)
    with concurrent(1):
        exchange_shared[3, 4](words)
    assert words.tolist() == [300 + 10 * b + (t + 1) % 4 for b in range(3) for t in range(4)]


def test_launches_of_a_stream_keep_their_order_and_events_order_streams():
    words = np.zeros(7, np.int64)
    with concurrent(5, most_delay=0.02):
        first, second, event = cuda.stream(), cuda.stream(), cuda.event()
        for value in (1, 2, 3):
            add[2, 2, first](words, value)
        event.record(first)
        event.wait(second)
        add[1, 4, second](words, 5)
        second.synchronize()
        assert (words == 2 * (2 * (2 * 1 + 2) + 3) + 5).all()


def test_a_failing_thread_ends_its_launch():
    with pytest.raises(ValueError, match="one thread fails"), concurrent():
        fail[1, 4](np.zeros(1))


def test_threads_end_and_numbas_simulator_is_restored():
    assert not any(thread.name == "dvkernels-simulated" for thread in threading.enumerate())
    words = np.zeros(3, np.int64)
    add[1, 3](words, 1)  # Numba's own simulator is back
    assert words.tolist() == [1, 1, 1]
