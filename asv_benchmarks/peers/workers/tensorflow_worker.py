"""Worker that all-reduces by tf.distribute's MirroredStrategy over logical CPU devices."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import protocol

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tensorflow as tf

size = int(sys.argv[1])
answer = protocol.claim_stdout()
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * size)
strategy = tf.distribute.MirroredStrategy([f"CPU:{rank}" for rank in range(size)])


@tf.function
def reduce(values):
    """All-reduce once in every replica."""

    def step(value):
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, value)

    return strategy.run(step, (values,))


def distributed(arrays):
    """Put one array on each device."""
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(arrays[context.replica_id_in_sync_group])
    )


checked: dict = {}  # values and wrong elements of the current count and dtype
for command in protocol.commands():
    count, dtype, iterations = command["count"], command["dtype"], command["iterations"]
    if (count, dtype) not in checked:
        every = protocol.inputs(count, size, dtype)
        expected = np.sum(every, axis=0, dtype=dtype)
        results = strategy.experimental_local_results(reduce(distributed(every)))
        wrong = sum(int((result.numpy() != expected).sum()) for result in results)
        checked = {(count, dtype): (distributed(protocol.steady(count, size, dtype)), wrong)}
    values, wrong = checked[count, dtype]
    reduce(values)
    started = time.perf_counter()
    for _ in range(iterations):
        result = reduce(values)
    strategy.experimental_local_results(result)[0].numpy()
    answer(seconds=(time.perf_counter() - started) / iterations, wrong=wrong, note="tf.function")
