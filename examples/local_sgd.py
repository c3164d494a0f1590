"""Local SGD: k steps on each replica without communication, then the mean of the weights."""

import numpy as np

import dvkernels as dv

LOCAL_STEPS, ROUNDS, RATE = 8, 40, 0.05

rng = np.random.default_rng(0)
features = rng.standard_normal((1001, 6))
truth = rng.standard_normal(6)
targets = features @ truth + 2.0

with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    with strategy.scope():
        # NONE: a write in a replica changes only that replica's copy.
        weights = dv.Variable(np.zeros(6), synchronization="none")
        offset = dv.Variable(0.0, synchronization="none")

    def local_steps(x, y, seed):
        context = dv.get_replica_context()
        order = np.random.default_rng([seed, context.replica_id_in_sync_group])
        for _ in range(LOCAL_STEPS):
            rows = order.integers(len(y), size=32)
            error = x[rows] @ weights.read_value() + offset.read_value() - y[rows]
            weights.assign_sub(RATE * x[rows].T @ error / len(rows))
            offset.assign_sub(RATE * error.mean())

    dataset = dv.Dataset.from_arrays((features, targets)).shuffle(seed=0).batch(1001)
    (part,) = strategy.distribute_dataset(dataset)
    for seed in range(ROUNDS):
        strategy.run(local_steps, args=(*part, seed))
        difference = np.abs(weights.values[0] - weights.values[1]).max()
        assert difference > 0, "between two synchronizations the copies differ"
        dv.sync([weights, offset], "mean")  # both variables in one all-reduce
        assert np.array_equal(weights.values[0], weights.values[1])

    np.testing.assert_allclose(weights.values[0], truth, atol=1e-3)
    np.testing.assert_allclose(offset.values[1], 2.0, atol=1e-3)
    print(f"{ROUNDS * LOCAL_STEPS} steps, {ROUNDS} synchronizations; last: {difference:.1e} apart")
