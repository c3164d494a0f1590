"""Live measurements from a producer thread: statistics that can be read between two steps.

Each replica adds to its own copy of three sums (ON_READ: a write does not communicate). A read
between two steps gives the sums over all measurements so far.
"""

import queue
import threading

import numpy as np

import dvkernels as dv

MEASUREMENTS, BATCH = 1000, 32
measured = np.random.default_rng(0).normal(20.0, 3.0, MEASUREMENTS)
arrived = queue.Queue(maxsize=100)  # bounded: a slow consumer makes the producer wait


def measure():
    for value in measured:
        arrived.put(value)
    arrived.put(None)  # the end


def next_batch():
    """Wait for one measurement, then add all that have arrived, without waiting for more."""
    batch = [arrived.get()]
    while batch[-1] is not None and len(batch) < BATCH:
        try:
            batch.append(arrived.get_nowait())
        except queue.Empty:
            break
    is_last = batch[-1] is None
    return np.array(batch[:-1] if is_last else batch, np.float64), is_last


with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    with strategy.scope():
        count, total, squares = (
            dv.Variable(start, synchronization="on_read", aggregation="sum")
            for start in (0, 0.0, 0.0)
        )

    def update(values):  # values may be empty
        count.assign_add(len(values))
        total.assign_add(values.sum())
        squares.assign_add(values @ values)

    producer = threading.Thread(target=measure)
    producer.start()
    is_last, shown = False, 0
    while not is_last:
        batch, is_last = next_batch()
        strategy.run(update, args=(dv.PerReplica(np.array_split(batch, 2)),))
        n = int(count)
        if n >= shown + 250:  # at any step, not only at the end of an epoch
            mean = float(total) / n
            spread = np.sqrt(float(squares) / n - mean**2)
            print(f"{n} measurements so far: {mean:.3f} +- {spread:.3f}")
            shown = n
    producer.join()

assert n == MEASUREMENTS
np.testing.assert_allclose(float(total) / n, measured.mean())
np.testing.assert_allclose(float(squares), (measured**2).sum())
