"""Live counters from a stream: workers count events as they come, and anybody reads the counts.

Two threads; or processes, of which the last one serves the counters:
``python -m dvkernels launch -n 4 --engine local live_counters.py 1``
"""

import queue
import sys
import threading

import numpy as np

import dvkernels as dv

EVENTS, PAGES, BATCH = 20_000, 1000, 50

# In a job of processes all but the first one end here, when that has closed the strategy.
how = {"num_servers": int(sys.argv[1])} if sys.argv[1:] else {"num_workers": 2}
strategy = dv.ParameterServerStrategy(**how)

visited = np.random.default_rng(0).zipf(1.3, EVENTS) % PAGES  # the pages that users look at
arrived = queue.Queue(maxsize=100)  # bounded: slow workers make the source wait


def source():
    for batch in np.split(visited, EVENTS // BATCH):
        arrived.put(batch)
    arrived.put(None)  # the end


with strategy:
    with strategy.scope():
        visits = dv.Variable(np.zeros(PAGES, np.int64), name="visits")
    coordinator = dv.ClusterCoordinator(strategy)

    def count(pages):
        visits.scatter_add(pages, np.ones(len(pages), np.int64))

    threading.Thread(target=source).start()
    shown = 0
    while (batch := arrived.get()) is not None:
        coordinator.schedule(count, (batch,), once=True)  # once, though a worker may be lost
        counts = visits.read_value()  # at any time: no call waits for another
        if counts.sum() >= shown + EVENTS // 4:
            shown = counts.sum()
            print(f"{shown} visits so far, most of page {counts.argmax()}")
    coordinator.join()
    np.testing.assert_array_equal(visits, np.bincount(visited, minlength=PAGES))
    print(coordinator.stats())
