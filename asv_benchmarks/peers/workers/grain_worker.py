"""Worker that reads batches by grain, in one process, without threads or with two of them."""

from __future__ import annotations

import itertools
import time

import grain
import input_data
import numpy as np
import protocol


def dataset(case, folder):
    """Return the data set of a case."""
    if case.startswith("decode"):
        source = grain.MapDataset.source(input_data.Blobs()).shuffle(seed=1)
        mapped = source.map(input_data.decoded)
    else:
        rows = input_data.Rows(*input_data.labelled(case, folder))
        mapped = grain.MapDataset.source(rows).shuffle(seed=1)
    batched = mapped.batch(input_data.BATCH)
    threads = 2 if case.endswith("2") else 0
    return batched.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4))


answer = protocol.claim_stdout()
datasets: dict = {}  # of the current case
for command in protocol.commands():
    case, count = command["case"], command["batches"]
    if case not in datasets:
        datasets = {case: dataset(case, command["folder"])}
    batches = iter(datasets[case])
    seen = [next(batches)]
    started = time.perf_counter()
    seen += itertools.islice(batches, count)
    seconds = (time.perf_counter() - started) / count
    labels = np.concatenate([b[:, 0] if case.startswith("decode") else b[1] for b in seen])
    answer(seconds=seconds, wrong=len(labels) - len(set(labels.tolist())), note="")
