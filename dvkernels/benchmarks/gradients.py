"""Benchmarks of gradients in a step: all-reduce of many arrays, fused Adam, compiled barriers."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from dvkernels import kernels
from dvkernels.benchmarks.probe import Probe
from dvkernels.benchmarks.stopwatch import Samples, alternate, timed
from dvkernels.kernels.cpu import group, optimizers

__all__ = ["barrier_seconds", "fused_adam", "many", "resnet_50_shapes"]

Array = np.ndarray[Any, Any]


def resnet_50_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of the 161 trainable arrays of a ResNet-50.

    He et al., CVPR 2016, doi:10.1109/CVPR.2016.90.

    >>> sum(int(np.prod(shape)) for shape in resnet_50_shapes()), len(resnet_50_shapes())
    (25557032, 161)
    """
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inner = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            for shape in ((width, inner, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * width, inner, 1, 1), (4 * width,), (4 * width,)]
            inner = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def _random(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def many(num_replicas: int, num_rounds: int) -> dict[str, Samples]:
    """Time the mean of a ResNet-50's gradients and the memory probe; raise if the mean is wrong."""
    groups = [
        [_random(shape, 1000 * k + rank) for rank in range(num_replicas)]
        for k, shape in enumerate(resnet_50_shapes())
    ]
    expected_means = [np.mean(np.array(arrays, np.float64), axis=0) for arrays in groups]
    kernels.all_reduce_many(groups, "mean")
    for arrays, expected in zip(groups, expected_means, strict=True):
        for array in arrays:
            np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-6)
    total = sum(arrays[0].size for arrays in groups)
    flat = [_random((total,), rank) for rank in range(num_replicas)]
    probe = Probe(flat, [], 2 * num_replicas * flat[0].nbytes)
    return alternate(
        {
            "ours": lambda: timed(lambda: kernels.all_reduce_many(groups, "mean"), 2),
            "probe": lambda: probe.seconds(2),
        },
        num_rounds,
    )


def fused_adam(num_replicas: int, nbytes: int, num_rounds: int) -> dict[str, Samples]:
    """Time mean and Adam in one pass, and in separate passes; each replica has all states.

    The separate passes are our all-reduce, and then our Adam kernel for each replica.
    """
    length = nbytes // 4
    gradients = [_random((length,), rank) for rank in range(num_replicas)]
    parameter = _random((length,), 99)
    states = [
        [np.array(first) for _ in range(num_replicas)]
        for first in (parameter, np.zeros_like(parameter), np.zeros_like(parameter))
    ]
    adam = functools.partial(optimizers.adam, step=5, learning_rate=1e-3)

    def fused() -> None:
        adam([gradients], *([state] for state in states))

    def separate() -> None:
        kernels.all_reduce(gradients, "mean")
        for rank in range(num_replicas):
            adam([gradients[rank : rank + 1]], *([state[rank : rank + 1]] for state in states))

    calls: dict[str, Callable[[], None]] = {"fused": fused, "separate": separate}
    timers = {name: functools.partial(timed, call, 1) for name, call in calls.items()}
    return alternate(timers, num_rounds)


@numba.njit(nogil=True)
def _barriers(state, rank, count):  # type: ignore[no-untyped-def]
    for _ in range(count):
        group.barrier(state, rank)


def barrier_seconds(num_replicas: int, count: int = 100_000) -> float:
    """Return the mean seconds of a barrier inside compiled code."""
    threads_group = group.Group(num_replicas)
    _barriers(group.Group(1).state, 0, 1)  # compiles
    threads = [
        threading.Thread(target=_barriers, args=(threads_group.state, rank, count))
        for rank in range(1, num_replicas)
    ]
    for thread in threads:
        thread.start()
    _barriers(threads_group.state, 0, 1)  # all threads have arrived
    started = time.perf_counter()
    _barriers(threads_group.state, 0, count - 1)
    seconds = (time.perf_counter() - started) / (count - 1)
    for thread in threads:
        thread.join()
    return seconds
