"""The memory limit, measured: what moving the bytes of an in-place all-reduce takes at least.

R buffers of S bytes, each element read once and written once: 2 R S bytes, without any sum. Each
thread runs one compiled call; the threads wait at a gate before it and are not started in the
timed region.
"""

from __future__ import annotations

import os
import threading
import time

import numba
import numpy as np


@numba.njit(nogil=True)
def _one_after_another(buffers, start, stop):
    for buffer in buffers:
        for i in range(start, stop):
            buffer[i] += np.float32(1)


@numba.njit(nogil=True)
def _in_step(a, b, start, stop):
    for i in range(start, stop):
        a[i] += np.float32(1)
        b[i] += np.float32(1)


def probe_seconds(buffers, num_threads, in_step):
    """Time one pass of ``num_threads`` threads over two float32 buffers of one length."""
    length = buffers[0].size
    gate = threading.Barrier(num_threads + 1)

    def work(k):
        start, stop = length * k // num_threads, length * (k + 1) // num_threads
        gate.wait()
        if in_step:
            _in_step(buffers[0], buffers[1], start, stop)
        else:
            _one_after_another((buffers[0], buffers[1]), start, stop)
        gate.wait()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(num_threads)]
    for thread in threads:
        thread.start()
    gate.wait()
    began = time.perf_counter()
    gate.wait()
    seconds = time.perf_counter() - began
    for thread in threads:
        thread.join()
    return seconds


def fastest_probe_seconds(buffers):
    """Return the faster of both orders, on one thread and on all usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(
        probe_seconds(buffers, num_threads, in_step)
        for num_threads in {1, cores}
        for in_step in (False, True)
    )
