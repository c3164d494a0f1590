"""Benchmark of input pipelines: seconds per batch, against other libraries, in rounds in turn."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dvkernels.benchmarks.stopwatch import Samples, alternate
from dvkernels.data.dataset import Dataset
from dvkernels.strategies.mirrored import MirroredStrategy
from peers.registry import Peer
from peers.worker import Worker
from peers.workers import input_data

__all__ = ["CASES", "PEERS", "measure"]

# Description of each case, and its number of batches per round.
CASES = {
    "arrays": ("100 000 shuffled rows of 64 float32 and a label, in memory", 400),
    "memmap": ("the same rows, mapped from a file", 400),
    "decode": ("16 KiB arrays to decompress in Python, no workers", 40),
    "decode, 2": ("the same, two workers", 40),
}
PEERS: Mapping[str, Peer] = {
    "dataloader": Peer("torch", "torch", "dataloader_worker.py", False, "pip install torch"),
    "grain": Peer("grain", "grain", "grain_worker.py", False, "pip install grain"),
    "tensorflow": Peer(
        "tensorflow-cpu", "tensorflow", "tf_input_worker.py", False, "pip install tensorflow-cpu"
    ),
}


def measure(
    case: str, folder: str, num_rounds: int, workers: Mapping[str, Worker]
) -> dict[str, Samples]:
    """Return the seconds per batch of this library and of each peer that supports the case.

    Each library parallelizes in its own way; our batches are split over two replicas.
    """
    count = CASES[case][1]
    with contextlib.ExitStack() as stack:
        timers: dict[str, Callable[[], float]] = {"dvkernels": _ours(case, folder, count, stack)}
        for name, worker in workers.items():
            command = {"case": case, "batches": count, "folder": folder}
            first = worker.send(command)
            if first.note == "not measured":
                continue
            if first.wrong:
                raise AssertionError(f"{name} delivered {first.wrong} elements twice")
            timers[name] = lambda w=worker, c=command: w.send(c).seconds  # type: ignore[misc]
        return alternate(timers, num_rounds)


def _ours(case: str, folder: str, count: int, stack: contextlib.ExitStack) -> Callable[[], float]:
    strategy = stack.enter_context(MirroredStrategy(["cpu:0", "cpu:1"]))
    if case.startswith("decode"):
        threads = 2 if case.endswith("2") else 0
        blobs = Dataset.from_sequence(input_data.Blobs()).shuffle(seed=1)
        data = blobs.map(input_data.decoded, num_workers=threads).batch(input_data.BATCH)
    else:
        data = Dataset.from_arrays(input_data.labelled(case, folder)).shuffle(seed=1)
        data = data.batch(input_data.BATCH)
    distributed = strategy.distribute_dataset(data)

    def once() -> float:
        with iter(distributed) as batches:
            seen = [next(batches)]
            started = time.perf_counter()
            seen += itertools.islice(batches, count)
            seconds = (time.perf_counter() - started) / count
        labels = np.concatenate([_labels(batch) for batch in seen])
        if len(np.unique(labels)) != len(labels):
            raise AssertionError("an element was delivered twice")
        return seconds

    return once


def _labels(batch: Any) -> Any:
    if isinstance(batch, tuple):
        return np.concatenate(batch[1].values)
    return np.concatenate([part[:, 0] for part in batch.values])
