"""Worker that all-reduces by JAX: psum over several CPU devices of one process."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import protocol

size = int(sys.argv[1])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={size}"
os.environ.setdefault("JAX_ENABLE_X64", "1")

import jax  # noqa: E402 - reads the variables above

answer = protocol.claim_stdout()
devices = jax.devices()[:size]
mesh = jax.make_mesh((size,), ("ranks",), devices=devices)
spec = jax.sharding.PartitionSpec("ranks")
sharding = jax.sharding.NamedSharding(mesh, spec)
reduce = jax.jit(
    jax.shard_map(lambda x: jax.lax.psum(x, "ranks"), mesh=mesh, in_specs=spec, out_specs=spec),
    donate_argnums=0,
)
checked: dict = {}  # data and wrong elements of the current count and dtype
for command in protocol.commands():
    count, dtype, iterations = command["count"], command["dtype"], command["iterations"]
    if (count, dtype) not in checked:
        every = protocol.inputs(count, size, dtype)
        got = np.asarray(reduce(jax.device_put(np.stack(every), sharding)))
        wrong = int((got != np.sum(every, axis=0, dtype=dtype)).sum())
        checked = {(count, dtype): (np.stack(protocol.steady(count, size, dtype)), wrong)}
    data, wrong = checked[count, dtype]
    elapsed = 0.0
    for portion in protocol.portions(iterations, size):
        value = reduce(jax.device_put(data, sharding)).block_until_ready()
        started = time.perf_counter()
        for _ in range(portion):
            value = reduce(value)
        value.block_until_ready()
        elapsed += time.perf_counter() - started
    del value
    answer(seconds=elapsed / iterations, wrong=wrong, note="psum, buffers donated")
