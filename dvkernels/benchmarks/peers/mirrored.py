"""TensorFlow's ``MirroredStrategy`` over logical CPU devices of one process."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np

from dvkernels.benchmarks import inputs
from dvkernels.benchmarks.peers import protocol

__all__: list[str] = []


class _AllReduce:
    variants: tuple[str, ...] = ("tf.function",)

    def __init__(self, tf: Any, num_replicas: int) -> None:
        self._tf = tf
        self._num_replicas = num_replicas
        devices = [f"CPU:{k}" for k in range(num_replicas)]
        self._strategy = tf.distribute.MirroredStrategy(devices)

        def reduce_own(value: Any) -> Any:
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, value)

        self._reduce = tf.function(lambda values: self._strategy.run(reduce_own, args=(values,)))

    def prepare(self, count: int, dtype: np.dtype[Any], seed: int) -> None:
        self._inputs: Any = None

        def own(context: Any) -> Any:
            row = np.empty(count, dtype)
            inputs.fill(row, "sum", seed, context.replica_id_in_sync_group)
            return self._tf.constant(row)

        self._inputs = self._strategy.experimental_distribute_values_from_function(own)

    def call_once(self, variant: str) -> list[np.ndarray[Any, Any]]:
        results = self._strategy.experimental_local_results(self._reduce(self._inputs))
        return [result.numpy() for result in results]

    def seconds(self, variant: str, num_calls: int) -> float:
        reduce, values = self._reduce, self._inputs
        local = self._strategy.experimental_local_results
        local(reduce(values))
        return protocol.repeat(lambda: local(reduce(values)), num_calls, time.perf_counter)


def main() -> None:
    """Serve: one process holds all devices."""
    num_replicas = int(sys.argv[1])
    line = protocol.Line()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    configuration = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [configuration] * num_replicas)
    actor = protocol.Actor(_AllReduce(tf, num_replicas), num_replicas)
    ready = {
        "version": f"TensorFlow {tf.__version__}",
        "ranks": num_replicas,
        "variants": list(_AllReduce.variants),
    }
    protocol.serve(line, actor, protocol.Alone(), ready)
