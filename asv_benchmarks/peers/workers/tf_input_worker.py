"""Worker that reads batches by tf.distribute: a dataset over two logical CPUs, read eagerly."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import itertools
import time

import input_data
import numpy as np
import protocol
import tensorflow as tf

answer = protocol.claim_stdout()
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
datasets: dict = {}  # of the current case
for command in protocol.commands():
    case, count = command["case"], command["batches"]
    if case != "arrays":
        answer(seconds=0.0, wrong=0, note="not measured")
        continue
    if case not in datasets:
        features, labels = input_data.rows()
        data = tf.data.Dataset.from_tensor_slices((features, labels)).shuffle(len(labels))
        datasets = {case: strategy.experimental_distribute_dataset(data.batch(input_data.BATCH))}
    batches = iter(datasets[case])
    seen = [next(batches)]
    started = time.perf_counter()
    seen += itertools.islice(batches, count)
    seconds = (time.perf_counter() - started) / count
    labels = np.concatenate([part.numpy() for b in seen for part in b[1].values])
    answer(seconds=seconds, wrong=len(labels) - len(set(labels.tolist())), note="")
