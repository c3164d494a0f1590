"""A NumPy step of about twenty calls on two local workers, beside two replica threads.

``python -m peers.local_step [--rounds N]``, in ``asv_benchmarks/`` of a clone. The step is forward,
backward and update of the digits network, in plain NumPy with one BLAS thread a replica. *Possible*
is the same computation in two processes at once, each on half of the batch, with no library and no
synchronization. Blocks of all alternate within the same two processes; a row has medians per step,
and the median and quartiles of the ratios of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import threadpoolctl
from programs import network

import dvkernels as dv

_SHAPES = ((1024, 1024), (128, 256))  # batch of all replicas, hidden units
_BLOCK_SECONDS = 0.1
_RATE = np.float32(1e-3)

Arrays = list[np.ndarray[Any, Any]]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    rounds: int = parser.parse_args().rounds
    print("batch x hidden | alone | possible | workers | threads | workers / possible | threads /")
    for batch, hidden in _SHAPES:
        blocks = dv.launch(_blocks_of_worker, args=(batch, hidden, rounds), workers=2)[0]
        medians = {name: 1e3 * statistics.median(times) for name, times in blocks.items()}
        ratios = [_attained(blocks["possible"], blocks[name]) for name in ("workers", "threads")]
        times = [f"{milliseconds:.2f} ms" for milliseconds in medians.values()]
        print(" | ".join([f"{batch} x {hidden}", *times, *ratios]))


def _attained(possible: list[float], ours: list[float]) -> str:
    """Return the part of the possible speed-up: the ratio of the times, block by block."""
    ratios = [one / two for one, two in zip(possible, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _blocks_of_worker(batch: int, hidden: int, rounds: int) -> dict[str, list[float]]:
    """Measure in one of two workers: seconds per step, by block."""
    threadpoolctl.threadpool_limits(1)
    rng = np.random.default_rng(0)
    images = rng.random((batch, 64), np.float32)
    labels = rng.integers(0, 10, batch)
    half = slice(0, batch // 2)
    with (
        dv.MultiWorkerMirroredStrategy(devices=1) as workers,
        dv.MirroredStrategy(["cpu:0", "cpu:1"]) as threads,
    ):
        rank = workers.cluster_resolver.worker_id

        def step_of(rows: slice, combine: Callable[[Arrays], Any]) -> Callable[[], None]:
            weights = _weights(hidden)
            x, y = images[rows], labels[rows]
            return lambda: _step(x, y, weights, combine)

        def reduced(gradients: Arrays) -> Any:
            context: Any = dv.get_replica_context()
            return context.all_reduce("mean", gradients)

        steps = [step_of(slice(0, batch // 2), reduced), step_of(slice(batch // 2, batch), reduced)]
        own = step_of(half, reduced)

        def of_a_thread() -> None:
            context: Any = dv.get_replica_context()
            steps[context.replica_id_in_sync_group]()

        calls: dict[str, tuple[Callable[[], Any], bool]] = {
            "alone": (step_of(slice(0, batch), list), rank == 0),
            "possible": (step_of(half, list), True),
            "workers": (functools.partial(workers.run, own), True),
            "threads": (functools.partial(threads.run, of_a_thread), rank == 0),
        }
        number = _number(workers, calls["possible"][0])
        blocks: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):
            for name, (call, takes_part) in calls.items():
                _meet(workers, 0)
                began = time.perf_counter()
                for _ in range(number if takes_part else 0):
                    call()
                if takes_part:
                    seconds = (time.perf_counter() - began) / number
                    blocks[name] += [seconds] * (turn > 0)  # the first compiles, and warms up
        return blocks


def _number(strategy: dv.Strategy, step: Callable[[], None]) -> int:
    """Return how many steps a block has; the workers agree."""
    step()
    began = time.perf_counter()
    step()
    number = max(5, int(_BLOCK_SECONDS / (time.perf_counter() - began)))
    return _meet(strategy, number)


def _meet(strategy: dv.Strategy, number: int) -> int:
    """Wait for the other worker; return the greater of their numbers."""

    def greatest() -> Any:
        context: Any = dv.get_replica_context()
        return context.all_reduce("max", np.int64(number))

    return int(strategy.local_results(strategy.run(greatest))[0])


def _weights(hidden: int) -> Arrays:
    rng = np.random.default_rng(1)
    shapes = ((64, hidden), (hidden,), (hidden, 10), (10,))
    return [rng.standard_normal(shape, np.float32) * np.float32(0.1) for shape in shapes]


def _step(x: Any, y: Any, weights: Arrays, combine: Callable[[Arrays], Any]) -> None:
    """Forward, backward, combination of the gradients, update: about twenty calls of NumPy."""
    gradients = combine(network.gradients(x, y, weights))
    for weight, gradient in zip(weights, gradients, strict=True):
        weight -= _RATE * gradient


if __name__ == "__main__":
    main()
