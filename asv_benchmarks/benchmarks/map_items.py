"""``strategy.map`` beside ``ThreadPoolExecutor.map``: two threads each, in alternating rounds.

Both are kept open from round to round, and both give all results in order. Items are of one length
(compiled, without the interpreter's lock), or those of the how-to page. ``python map_items.py``
prints medians and quartiles.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import dvkernels as dv
from benchmarks import grid, rounds
from dvkernels.benchmarks import stopwatch

NUM_THREADS = 2
NUM_ROUNDS = rounds(15)
SECONDS_PER_ROUND = 0.1  # of one thread
LENGTHS = {"50 us": 50e-6, "200 us": 200e-6, "1 ms": 1e-3, "10 ms": 1e-2, "50 ms": 5e-2}


def _spins():
    """Return for each length a function that computes for so long, and its items."""
    import numba

    @numba.njit(nogil=True)
    def spin(rounds):
        total = 0.0
        for k in range(rounds):
            total += (k % 7) * 0.5
        return total

    spin(1)
    per_round = stopwatch.median_seconds(lambda: spin(100_000), budget_seconds=0.2) / 100_000
    for name, seconds in LENGTHS.items():
        rounds = int(seconds / per_round)
        count = max(4 * NUM_THREADS, int(SECONDS_PER_ROUND / seconds))
        yield name, lambda k, rounds=rounds: spin(rounds + k), range(count)


def _bootstrap():
    sample = np.random.default_rng(0).normal(10.0, 2.0, 10_000)

    def resampled_mean(seed):
        return np.random.default_rng(seed).choice(sample, len(sample)).mean()

    return resampled_mean, np.random.SeedSequence(1).spawn(500)


def _sweep():
    x = np.linspace(0.0, 1.0, 5000)
    y = np.sin(6 * x)

    def error(degree):
        fit = np.polynomial.Polynomial.fit(x[::2], y[::2], degree)
        return np.square(fit(x[1::2]) - y[1::2]).mean()

    return error, [1 + k % 15 for k in range(80)]


def _pictures():
    pictures = np.random.default_rng(2).random((40, 256, 256))

    def smooth(picture):
        spectrum = np.fft.rfft2(picture)
        spectrum[:, 32:] = 0
        return np.fft.irfft2(spectrum, picture.shape)

    return smooth, pictures


def _moments(folder):
    path = Path(folder, "data.npy")
    np.save(path, np.random.default_rng(3).normal(1e4, 1.0, 8_000_000).astype(np.float32))

    def moments(part):
        values = part.astype(np.float64)
        return len(values), values.mean(), values.var()

    return moments, np.array_split(np.load(path, mmap_mode="r"), 64)


NAMES = [*LENGTHS, "bootstrap", "sweep", "pictures", "memmap"]


class MapItems:
    params = grid(NAMES)
    param_names = ("items",)
    timeout = 300

    def setup(self, name):
        self.folder = tempfile.TemporaryDirectory()
        makers = {
            "bootstrap": _bootstrap,
            "sweep": _sweep,
            "pictures": _pictures,
            "memmap": lambda: _moments(self.folder.name),
        }
        if name in makers:
            self.fn, self.items = makers[name]()
        else:
            self.fn, self.items = {length: (fn, items) for length, fn, items in _spins()}[name]
        self.strategy = dv.MirroredStrategy(NUM_THREADS)
        self.pool = ThreadPoolExecutor(NUM_THREADS)
        for ours, theirs, alone in zip(
            self.strategy.map(self.fn, self.items),
            self.pool.map(self.fn, self.items),
            map(self.fn, self.items),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, alone)
            np.testing.assert_array_equal(theirs, alone)

    def teardown(self, name):
        self.strategy.close()
        self.pool.shutdown()
        self.folder.cleanup()

    def rounds(self, *names):
        calls = {
            "map": lambda: list(self.strategy.map(self.fn, self.items)),
            "pool": lambda: list(self.pool.map(self.fn, self.items)),
            "alone": lambda: list(map(self.fn, self.items)),
        }
        return stopwatch.alternate(
            {name: lambda call=calls[name]: stopwatch.timed(call, 1) for name in names},
            NUM_ROUNDS,
        )

    def track_time_over_that_of_a_thread_pool(self, name):
        samples = self.rounds("map", "pool")
        return stopwatch.ratio(samples["map"], samples["pool"])


def main() -> None:
    """Print the table."""
    print("items        map / pool   map [ms]                pool [ms]               alone [ms]")
    for name in NAMES:
        case = MapItems()
        case.setup(name)
        samples = case.rounds("map", "pool", "alone")
        case.teardown(name)
        print(
            f"{name:12} {stopwatch.ratio(samples['map'], samples['pool']):10.3f}",
            *(
                f"  {1e3 * each.median:7.2f} ({1e3 * low:6.2f} to {1e3 * high:6.2f})"
                for each in samples.values()
                for low, high in [each.quartiles]
            ),
        )


if __name__ == "__main__":
    main()
