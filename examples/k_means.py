"""Lloyd's k-means: each replica assigns its points; sums and counts are all-reduced."""

import numpy as np

import dvkernels as dv

CLUSTERS, ROUNDS = 4, 20


def nearest(points, centers):
    distances = ((points[:, None, :] - centers[None, :, :]) ** 2).sum(axis=2)
    return distances.argmin(axis=1)


def sums_and_counts(points, centers):
    own = nearest(points, centers)
    sums = np.zeros_like(centers)
    np.add.at(sums, own, points)
    return sums, np.bincount(own, minlength=len(centers))


def cluster(points, start):
    """Cluster the points of all replicas; every replica returns the same centers."""
    context = dv.get_replica_context()
    centers = start
    for _ in range(ROUNDS):
        sums, counts = context.all_reduce("sum", sums_and_counts(points, centers))
        # A center without points in any replica stays where it is.
        moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centers)
        if np.array_equal(moved, centers):  # all replicas have the same bits, so all of them stop
            break
        centers = moved
    return centers


rng = np.random.default_rng(0)
truth = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]])
points = np.concatenate([center + rng.standard_normal((501, 2)) for center in truth])
start = truth + rng.standard_normal(truth.shape)

with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    shuffled = dv.Dataset.from_arrays(points).shuffle(seed=0).batch(len(points))
    (part,) = strategy.distribute_dataset(shuffled)
    centers = strategy.run(cluster, args=(part, start))

alone = cluster(points, start)  # outside every strategy the default strategy has one replica
assert np.array_equal(centers.on(0), centers.on(1))
np.testing.assert_allclose(centers.on(0), alone, rtol=1e-9)
np.testing.assert_allclose(alone, truth, atol=0.25)
print("centers:", np.round(centers.on(0), 2).tolist())
