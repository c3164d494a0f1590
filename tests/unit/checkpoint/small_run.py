"""Small training run that saves after every step, for the tests that kill it.

Usage: small_run.py FOLDER STEPS [--replicas N] [--background]
"""

import argparse
import hashlib
import time

import numpy as np

import dvkernels as dv


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0)
    options = parser.parse_args()

    strategy = dv.MirroredStrategy([f"cpu:{k}" for k in range(options.replicas)])
    with strategy.scope():
        weights = dv.Variable(np.zeros(1000), aggregation="mean", name="weights")
        seen = dv.Variable(0, synchronization="on_read", aggregation="sum", name="seen")
    optimizer = dv.optimizers.Adam(0.01)
    noise = np.random.default_rng(7)
    data = dv.Dataset.range(50).shuffle(seed=1).repeat().batch(8)
    batches = iter(strategy.distribute_dataset(data))
    history = {"steps": 0, "elements": [], "draws": ""}
    checkpoint = dv.Checkpoint(
        weights=weights, seen=seen, optimizer=optimizer, noise=noise, batches=batches,
        history=history,
    )  # fmt: skip
    manager = dv.CheckpointManager(checkpoint, options.folder, max_to_keep=2)

    def step(batch, draw):
        replica = dv.get_replica_context()
        # The mean over the replicas is that of the whole batch, for any number of replicas.
        target = np.full(1000, batch.sum() * replica.num_replicas_in_sync / 100) + draw
        seen.assign_add(len(batch))
        optimizer.apply_gradients([(weights.read_value() - target, weights)])
        return replica.replica_id_in_sync_group

    with manager, dv.PreemptionHandler(manager) as preemption:
        manager.restore_latest()
        while history["steps"] < options.steps:
            batch = next(batches)
            draw = noise.normal()
            strategy.run(step, (batch, draw))
            history["steps"] += 1
            history["elements"] += [int(x) for part in batch.values for x in part]
            history["draws"] = hashlib.sha256(f"{history['draws']} {draw!r}".encode()).hexdigest()
            manager.save(history["steps"], background=options.background)
            print("step", history["steps"], flush=True)
            preemption.after_step(history["steps"])
            time.sleep(options.pause)
    digest = hashlib.sha256(weights.numpy().tobytes())
    digest.update(repr((int(seen), history)).encode())
    print("result", digest.hexdigest(), float(np.linalg.norm(weights.numpy())))


if __name__ == "__main__":
    main()
