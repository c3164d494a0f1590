"""Calls of a coordinator and requests of its variables, beside a bare queue and plain variables."""

from __future__ import annotations

import functools
import queue
import threading

import numpy as np

import dvkernels as dv
from benchmarks import rounds
from dvkernels.benchmarks.stopwatch import alternate, median_seconds, ratio, timed

NUM_CALLS, NUM_IDS, NUM_ROWS, WIDTH, NUM_ROUNDS = 2000, 13_312, 1_000_000, 16, rounds(21)


def nothing() -> None:
    """Stand for a call."""


class Coordinator:
    timeout = 300

    def setup(self):
        self.strategy = dv.ParameterServerStrategy(num_workers=2)
        self.coordinator = dv.ClusterCoordinator(self.strategy)
        rng = np.random.default_rng(0)
        self.ids = rng.integers(0, NUM_ROWS, NUM_IDS)
        self.rows = rng.random((NUM_IDS, WIDTH), np.float32)
        self.out = np.empty_like(self.rows)
        with self.strategy.scope():
            self.served = dv.Variable(np.zeros((NUM_ROWS, WIDTH), np.float32))
        self.plain = dv.Variable(np.zeros((NUM_ROWS, WIDTH), np.float32))
        for variable in (self.served, self.plain):
            self.gather_and_add(variable)
        np.testing.assert_array_equal(self.served, self.plain)

    def teardown(self):
        self.strategy.close()

    def schedule_and_join(self):
        for _ in range(NUM_CALLS):
            self.coordinator.schedule(nothing)
        self.coordinator.join()

    def gather_and_add(self, variable):
        variable.gather_rows(self.ids, out=self.out)
        variable.scatter_add(self.ids, self.rows)

    def bare_queue(self):
        calls, ends = queue.SimpleQueue(), queue.SimpleQueue()

        def work():
            while (call := calls.get()) is not None:
                call()
                ends.put(None)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(NUM_CALLS):
            calls.put(nothing)
        for _ in range(NUM_CALLS):
            ends.get()
        for _ in threads:
            calls.put(None)
        for thread in threads:
            thread.join()

    def track_call(self):
        return 1e6 * median_seconds(self.schedule_and_join) / NUM_CALLS

    def track_call_of_a_bare_queue(self):
        return 1e6 * median_seconds(self.bare_queue) / NUM_CALLS

    def track_rows_gathered_and_added(self):
        return NUM_IDS / median_seconds(lambda: self.gather_and_add(self.served)) / 1e6

    def track_rows_beside_a_plain_variable(self):
        timers = {
            name: functools.partial(timed, functools.partial(self.gather_and_add, variable), 5)
            for name, variable in (("served", self.served), ("plain", self.plain))
        }
        found = alternate(timers, NUM_ROUNDS)
        return ratio(found["served"], found["plain"])

    track_call.unit = "us"
    track_call_of_a_bare_queue.unit = "us"
    track_rows_gathered_and_added.unit = "million rows/s"
    track_rows_beside_a_plain_variable.unit = "of the time of a plain variable"


if __name__ == "__main__":
    benchmark = Coordinator()
    benchmark.setup()
    for name in filter(lambda name: name.startswith("track"), vars(Coordinator)):
        track = getattr(benchmark, name)
        print(f"{name}: {track():.3g} {track.unit}")
    benchmark.teardown()
