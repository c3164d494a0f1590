"""JAX's ``psum`` over several CPU devices of one process."""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any

import numpy as np

from dvkernels.benchmarks import inputs
from dvkernels.benchmarks.peers import protocol

__all__: list[str] = []


class _AllReduce:
    variants: tuple[str, ...] = ("jit of shard_map",)

    def __init__(self, jax: Any, num_replicas: int) -> None:
        self._jax = jax
        self._num_replicas = num_replicas
        mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:num_replicas]), ("replica",))
        spec = jax.sharding.PartitionSpec("replica")
        self._sharding = jax.sharding.NamedSharding(mesh, spec)
        shard_map: Any = getattr(jax, "shard_map", None)
        if shard_map is None:  # before JAX 0.6
            experimental: Any = importlib.import_module("jax.experimental.shard_map")
            shard_map = experimental.shard_map
        self._psum = jax.jit(
            shard_map(
                lambda x: jax.lax.psum(x, "replica"),
                mesh=mesh,
                in_specs=spec,
                out_specs=jax.sharding.PartitionSpec(),
            )
        )

    def prepare(self, count: int, dtype: np.dtype[Any], seed: int) -> None:
        self._inputs: Any = None
        rows = np.empty((self._num_replicas, count), dtype)
        for replica, row in enumerate(rows):
            inputs.fill(row, "sum", seed, replica)
        self._inputs = self._jax.device_put(rows, self._sharding)
        self._inputs.block_until_ready()

    def call_once(self, variant: str) -> list[np.ndarray[Any, Any]]:
        result = self._psum(self._inputs)
        return [np.asarray(shard.data).reshape(-1) for shard in result.addressable_shards]

    def seconds(self, variant: str, num_calls: int) -> float:
        psum, x = self._psum, self._inputs
        psum(x).block_until_ready()
        return protocol.repeat(lambda: psum(x).block_until_ready(), num_calls, time.perf_counter)


def main() -> None:
    """Serve: one process holds all devices."""
    num_replicas = int(sys.argv[1])
    line = protocol.Line()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_replicas}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_X64"] = "1"
    import jax

    actor = protocol.Actor(_AllReduce(jax, num_replicas), num_replicas)
    ready = {
        "version": f"JAX {jax.__version__}",
        "ranks": num_replicas,
        "variants": list(_AllReduce.variants),
    }
    protocol.serve(line, actor, protocol.Alone(), ready)
