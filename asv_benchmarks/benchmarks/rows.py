"""Rows of a variable, gathered and added, beside loops in C and NumPy in the same rounds.

The C loops are compiled by ``cc``; without it these benchmarks skip. 13 312 rows of 16 float32, as
an embedding of 26 columns reads for 512 examples, of a table in memory (64 MB) and in a cache.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import dvkernels as dv
from benchmarks import grid, rounds
from dvkernels.benchmarks.stopwatch import alternate, median_seconds, ratio, timed

NUM_IDS, WIDTH, NUM_REQUESTS, NUM_ROUNDS = 13_312, 16, 8, rounds(21)
C_LOOPS = """
#include <stdint.h>
void add(float *restrict table, const int64_t *restrict ids, const float *restrict rows,
         int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < width; j++)
            table[ids[i] * width + j] += rows[i * width + j];
}
void gather(const float *restrict table, const int64_t *restrict ids, float *restrict rows,
            int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < width; j++)
            rows[i * width + j] = table[ids[i] * width + j];
}
"""


@functools.cache
def c_loops():
    """Return the library of the loops in C; asv skips where no compiler is."""
    if shutil.which("cc") is None:
        raise NotImplementedError("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "loops.c"), Path(folder, "loops.so")
        source.write_text(C_LOOPS)
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", built]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(built))


class Rows:
    params = grid((10_000, 1_000_000))
    param_names = ("num_rows",)
    timeout = 300

    def setup(self, num_rows):
        self.loops, rng = c_loops(), np.random.default_rng(0)
        self.ids = [rng.integers(0, num_rows, NUM_IDS) for _ in range(NUM_REQUESTS)]
        self.rows = [rng.random((NUM_IDS, WIDTH), np.float32) for _ in range(NUM_REQUESTS)]
        self.table = np.zeros((num_rows, WIDTH), np.float32)
        self.variable = dv.Variable(self.table)
        self.out, self.taken = (np.empty_like(self.rows[0]) for _ in range(2))
        self.added, self.request = np.zeros_like(self.table), 0
        for act in (self.scatter_add, self.add_in_c, self.add_in_numpy):
            self.request = 0
            for _ in range(NUM_REQUESTS):
                act()
        np.testing.assert_array_equal(self.variable, self.table)
        np.testing.assert_array_equal(self.added, self.table)
        self.gather_rows()
        self.request -= 1
        self.gather_in_c()
        np.testing.assert_array_equal(self.out, self.taken)

    def next_request(self):
        self.request = (self.request + 1) % NUM_REQUESTS
        return self.ids[self.request], self.rows[self.request]

    def scatter_add(self):
        self.variable.scatter_add(*self.next_request())

    def gather_rows(self):
        self.variable.gather_rows(self.next_request()[0], out=self.out)

    def add_in_numpy(self):
        np.add.at(self.added, *self.next_request())

    def add_in_c(self):
        self._in_c(self.loops.add, *self.next_request())

    def gather_in_c(self):
        self._in_c(self.loops.gather, self.next_request()[0], self.taken)

    def _in_c(self, loop, ids, rows):
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (self.table, ids, rows))
        loop(*pointers, ctypes.c_int64(NUM_IDS), ctypes.c_int64(WIDTH))

    def beside(self, ours, reference, num_calls=NUM_REQUESTS):
        timers = {act: functools.partial(timed, act, num_calls) for act in (ours, reference)}
        found = alternate(timers, NUM_ROUNDS)
        return ratio(found[ours], found[reference])

    def track_scatter_add_beside_c(self, num_rows):
        return self.beside(self.scatter_add, self.add_in_c)

    def track_gather_rows_beside_c(self, num_rows):
        return self.beside(self.gather_rows, self.gather_in_c)

    def track_scatter_add_beside_numpy(self, num_rows):
        return self.beside(self.scatter_add, self.add_in_numpy, 1)

    def track_rows_gathered_and_added(self, num_rows):
        def both():
            self.gather_rows()
            self.scatter_add()

        return NUM_IDS / median_seconds(both) / 1e6

    track_scatter_add_beside_c.unit = "of the time of the loop"
    track_gather_rows_beside_c.unit = "of the time of the loop"
    track_scatter_add_beside_numpy.unit = "of the time of add.at"
    track_rows_gathered_and_added.unit = "million rows/s"


if __name__ == "__main__":
    for num_rows in Rows.params[0]:
        rows = Rows()
        rows.setup(num_rows)
        for name in filter(lambda name: name.startswith("track"), vars(Rows)):
            track = getattr(rows, name)
            print(f"{name} of {num_rows} rows: {track(num_rows):.3g} {track.unit}")
