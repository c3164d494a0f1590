"""Program of each process of a job under jax.distributed: rank, port, folder, devices."""

import os
import signal
import sys
import time

COUNT = int(sys.argv[4])  # devices of each process
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={COUNT}"
os.environ["JAX_PLATFORMS"] = "cpu"
RANK, PORT, FOLDER = int(sys.argv[1]), sys.argv[2], sys.argv[3]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import dvkernels as dv  # noqa: E402
from dvkernels.errors import (  # noqa: E402
    BufferMismatchError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    WorkerLostError,
)
from dvkernels.testing import check_strategy  # noqa: E402

here = dv.get_replica_context
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{PORT}", num_processes=2, process_id=RANK)
DEVICES = [f"jax:cpu:{k}" for k in range(COUNT)]
NUM_REPLICAS = 2 * COUNT
strategy = dv.TPUStrategy(DEVICES, timeout_seconds=60)
assert strategy.num_replicas_in_sync == NUM_REPLICAS
ids = dv.PerReplica([np.float32(COUNT * RANK + k) for k in range(COUNT)])
SUM_OF_IDS = sum(range(NUM_REPLICAS))


def raised(kind, call, *parts):
    with pytest.raises(kind) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), caught.value


def values(result):
    return [np.asarray(value).tolist() for value in strategy.local_results(result)]


def conformance():
    check_strategy(lambda _: dv.TPUStrategy(DEVICES, timeout_seconds=60), replicas=[NUM_REPLICAS])
    with dv.MirroredStrategy(DEVICES) as own:  # stays within its process
        total = own.run(lambda: here().all_reduce("sum", jax.numpy.float32(1 + RANK)))
        assert [float(value) for value in total.values] == [COUNT * (1 + RANK)] * COUNT


def collectives():
    """Eager, of JAX and of NumPy, and compiled: the same results."""

    def step(x, put):
        own = put(np.arange(4, dtype=np.float32) + x)
        return {
            "sum": here().all_reduce("sum", own),
            "mean": here().all_reduce("mean", {"a": own})["a"],
            "gather": here().all_gather(own),
            "part": here().reduce_scatter("sum", own),
            "root": here().broadcast(own, root=NUM_REPLICAS - 1),
            "later": here().all_reduce_async("sum", own).wait(),
            "weighted": here().all_reduce("mean", own, weight=x),
        }

    found = [
        strategy.run(step, (ids, jax.numpy.asarray)),
        strategy.run(step, (ids, lambda x: x)),
        strategy.run(strategy.jit(lambda x: step(x, jax.numpy.asarray)), (ids,)),
    ]
    for key, expected in found[0].items():
        for other in found[1:]:
            assert np.allclose(values(other[key]), values(expected), rtol=1e-6), key
    assert values(found[2]["sum"]) == [[SUM_OF_IDS + NUM_REPLICAS * k for k in range(4)]] * COUNT
    uneven = strategy.run(
        lambda: here().all_gather(jax.numpy.full(1 + here().replica_id_in_sync_group, 1.0 + RANK))
    )
    rows = [1.0 + k // COUNT for k in range(NUM_REPLICAS) for _ in range(1 + k)]
    assert values(uneven) == [rows] * COUNT


def training():
    """Variables of all modes, optimizers, batches and checkpoints, eagerly and compiled."""
    ends = []
    for compiled in (False, True):
        with strategy.scope():
            weight = dv.Variable(np.float32([1 + RANK, 2]))  # that of the first worker
            seen = dv.Variable(0.0, synchronization="on_read", aggregation="sum")
            own = dv.Variable(np.float32(0), synchronization="none")
        adam = dv.optimizers.Adam(0.1)

        def step(rows, counts, weight=weight, seen=seen, own=own, adam=adam):
            adam.apply_gradients([(weight.read_value() * rows.sum(), weight)])
            seen.assign_add(counts.sum())
            own.assign_add(jax.numpy.asarray(rows.sum()))

        run = strategy.jit(step) if compiled else step
        data = dv.Dataset.from_arrays(np.arange(1, 14, dtype=np.float32)).batch(5)
        for rows, counts in strategy.distribute_dataset(data, dv.InputOptions(pad=True)):
            strategy.run(run, (rows, counts))
        if compiled:
            assert run.traces == 1
        assert float(seen) == 13
        ends.append([weight.numpy().tolist(), *values(own)])
        checkpoint = dv.Checkpoint(weight=weight, seen=seen, adam=adam, strategy=strategy)
        checkpoint.save(f"{FOLDER}/{compiled}")
        weight.assign(np.zeros(2, np.float32))
        checkpoint.restore(f"{FOLDER}/{compiled}")
        assert weight.numpy().tolist() == ends[-1][0]
        assert float(seen) == 13
    assert np.allclose(ends[0][0], ends[1][0], rtol=1e-6)
    assert ends[0][1:] == ends[1][1:]


def disagreements():
    """They raise on all workers, after which the next step works."""
    ones = jax.numpy.ones(2)
    raised(
        CollectiveMismatchError,
        lambda: strategy.run(lambda: here().all_reduce("sum" if RANK else "max", ones)),
        "worker 0 called",
    )
    shape = dv.PerReplica([np.ones(2 + RANK, np.float32)] * COUNT)
    total = strategy.jit(lambda x: here().all_reduce("sum", x.sum()))
    raised(CollectiveMismatchError, lambda: strategy.run(total, (shape,)), "compiled step")

    def fails():
        if RANK:
            raise BufferMismatchError("of worker 1")
        return here().all_reduce("sum", ones)

    raised(
        (BufferMismatchError, CollectiveMismatchError), lambda: strategy.run(fails), "of worker 1"
    )
    assert values(strategy.run(total, (ids,))) == [SUM_OF_IDS] * COUNT


def loss():
    """Worker 1 is killed: worker 0 gets our error, from a compiled step and from then on."""
    with strategy.scope():
        total = dv.Variable(0.0, aggregation="sum")
    step = strategy.jit(lambda x: total.assign_add(x))
    for _ in range(3):
        strategy.run(step, (ids,))
    strategy.placement.workers.barrier()
    if RANK == 1:
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def go_on():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            strategy.run(step, (ids,))
            total.numpy()

    raised(WorkerLostError, go_on, "worker")
    raised(WorkerLostError, lambda: strategy.reduce("sum", ids))
    raised(WorkerLostError, go_on)  # from one of the next two steps


for part in (conformance, collectives, training, disagreements):
    part()
assert not issubclass(WorkerLostError, CollectiveTimeoutError)
print("all parts", flush=True)
loss()
print("lost", flush=True)
os._exit(0)  # at its exit JAX would wait for the other process
