"""A step of ``strategy.jit`` beside the same step written by hand with ``shard_map``.

``python -m peers.compiled_step [--devices 1,2,8] [--nets small,wide,deep] [--rounds N]``, in
``asv_benchmarks/`` of a clone; needs JAX. The step is forward, backward, mean of the gradients and
SGD of a dense network, with donation, on emulated CPU devices. Blocks of both alternate in one
process, once the weights after one step have been compared; a row has medians per step, and the
median and quartiles of ratio and difference of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import dvkernels as dv

# Sizes of the layers, and rows of each replica. "deep" has 100 variables.
_NETS = {
    "small": ([64, 64, 10], 64),
    "wide": ([64, 512, 10], 512),
    "deep": ([64] * 50 + [10], 64),
}
_BLOCK_SECONDS = 0.05
_RATE = 0.1


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", default="1,2,8")
    parser.add_argument("--nets", default=",".join(_NETS))
    parser.add_argument("--rounds", type=int, default=31)
    given = parser.parse_args()
    counts = [int(count) for count in given.devices.split(",")]
    # Before JAX starts.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(counts)}"
    print("| devices | network | by hand | `strategy.jit` | ratio | added |")
    print("|---|---|---|---|---|---|")
    for count in counts:
        for net in given.nets.split(","):
            print(_row(count, net, given.rounds), flush=True)


def _row(count: int, net: str, rounds: int) -> str:
    calls = _calls(count, *_NETS[net])
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    numbers = {name: _number(call) for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(numbers[name]):
                call()
            blocks[name].append(1e6 * (time.perf_counter() - began) / numbers[name])
    pairs = [*zip(blocks["by hand"], blocks["jit"], strict=True)]
    times = [f"{statistics.median(times):,.0f} µs" for times in blocks.values()]
    ratio = _spread([ours / hand for hand, ours in pairs], ".2f")
    added = _spread([ours - hand for hand, ours in pairs], ",.0f")
    return f"| {count} | {net} | {' | '.join(times)} | {ratio} | {added} µs |"


def _spread(numbers: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(numbers, n=4)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def _number(call: Callable[[], object]) -> int:
    """Return how many calls a block has."""
    for _ in range(3):
        call()
    began = time.perf_counter()
    call()
    return max(3, int(_BLOCK_SECONDS / (time.perf_counter() - began)))


def _calls(count: int, sizes: list[int], rows: int) -> dict[str, Callable[[], object]]:
    """Return a step by hand and one of a strategy, whose weights are the same after one step."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    draw = np.random.default_rng(0)
    weights = [
        (draw.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        for shape in itertools.pairwise(sizes)
    ]
    start = [(weight, np.zeros(weight.shape[1], np.float32)) for weight in weights]
    images = draw.standard_normal((count, rows, 64)).astype(np.float32)
    labels = draw.integers(0, 10, (count, rows)).astype(np.int32)

    def loss(parameters: Any, x: Any, y: Any) -> Any:
        for number, (weight, bias) in enumerate(parameters):
            x = (x if number == 0 else jnp.tanh(x)) @ weight + bias
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1))

    def by_hand(parameters: Any, x: Any, y: Any) -> Any:
        value, slopes = jax.value_and_grad(loss)(parameters, x, y)
        means = jax.lax.pmean(slopes, "replicas")
        return jax.tree.map(lambda p, d: p - _RATE * d, parameters, means), value[None]

    devices = jax.devices("cpu")[:count]
    mesh = Mesh(np.array(devices), ("replicas",))
    alike, split = PartitionSpec(), PartitionSpec("replicas")
    compiled = jax.jit(
        jax.shard_map(
            by_hand,
            mesh=mesh,
            in_specs=(alike, split, split),
            out_specs=(alike, split),
            check_vma=False,
        ),
        donate_argnums=0,
    )
    state = jax.device_put(start, NamedSharding(mesh, alike))
    x = jax.device_put(images.reshape(-1, 64), NamedSharding(mesh, split))
    y = jax.device_put(labels.reshape(-1), NamedSharding(mesh, split))

    def step_by_hand() -> None:
        nonlocal state
        state, value = compiled(state, x, y)
        jax.block_until_ready(value)

    strategy = dv.TPUStrategy([f"jax:cpu:{k}" for k in range(count)])
    with strategy.scope():
        variables = [(dv.Variable(weight), dv.Variable(bias)) for weight, bias in start]
    sgd = dv.optimizers.SGD(_RATE)

    def of_replica(x: Any, y: Any) -> Any:
        parameters = [(weight.read_value(), bias.read_value()) for weight, bias in variables]
        value, slopes = jax.value_and_grad(loss)(parameters, x, y)
        gradients = zip(
            jax.tree.leaves(slopes), [v for pair in variables for v in pair], strict=True
        )
        sgd.apply_gradients(gradients)
        return value

    step = strategy.jit(of_replica)
    # As for the step by hand, the batch lies on the devices before.
    rows_of_all = images.reshape(-1, 64), labels.reshape(-1)
    batches = dv.Dataset.from_arrays(rows_of_all).batch(count * rows)
    parts = next(iter(strategy.distribute_dataset(batches)))

    def step_of_strategy() -> None:
        jax.block_until_ready(strategy.run(step, parts).values)

    step_by_hand()
    step_of_strategy()
    for pair, expected in zip(variables, state, strict=True):
        for variable, array in zip(pair, expected, strict=True):
            np.testing.assert_allclose(variable.numpy(), np.asarray(array), atol=1e-5)
    return {"by hand": step_by_hand, "jit": step_of_strategy}


if __name__ == "__main__":
    main()
