"""All-reduces of a host group beside those of the same processes under MPI, over shared memory.

``mpiexec -n 2 python -m peers.host_group [--rounds N]``, in ``asv_benchmarks/`` of a clone, with an
interpreter that has mpi4py. Blocks of both alternate; a row has the medians of the first worker's
times per call, and the median and quartiles of the ratio of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

import dvkernels as dv
from dvkernels.cluster import HostGroup

_SIZES = tuple(4096 << k for k in range(0, 15, 2))
_BLOCK_SECONDS = 0.02


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    rounds: int = parser.parse_args().rounds
    comm = MPI.COMM_WORLD
    path = comm.bcast(f"dvkernels-{tempfile.gettempprefix()}-{time.time_ns()}")
    group = HostGroup(path, comm.rank, comm.size, path)
    with (
        dv.MultiWorkerMirroredStrategy(devices=1) as over_mpi,
        dv.MultiWorkerMirroredStrategy(group, devices=1) as over_file,
    ):
        if comm.rank == 0:
            print("bytes per process, arrays | under MPI | host group | ratio (quartiles)")
        for memory in ("own", "symmetric"):
            for nbytes in _SIZES:
                steps = [_step(each, nbytes, memory) for each in (over_mpi, over_file)]
                _report(comm, nbytes, memory, _blocks(comm, steps, rounds))


def _step(strategy: dv.MultiWorkerMirroredStrategy, nbytes: int, memory: str) -> Callable[[], None]:
    """Return an all-reduce in place, whose result has been checked."""
    workers = strategy.distribute_values_from_function(lambda c: 0).owner.workers
    rng = np.random.default_rng(workers.rank)
    shape, dtype = (nbytes // 4,), np.dtype(np.float32)
    array = workers.empty(shape, dtype, 1)[0] if memory == "symmetric" else np.empty(shape, dtype)
    array[:] = rng.integers(0, 100, shape)
    expected = sum(np.random.default_rng(k).integers(0, 100, shape) for k in range(workers.size))
    workers.all_reduce([array], dv.ReduceOp.SUM, [array])
    np.testing.assert_array_equal(array, expected)
    array[:] = 0
    return lambda: workers.all_reduce([array], dv.ReduceOp.SUM, [array])


def _blocks(
    comm: MPI.Comm, steps: list[Callable[[], None]], rounds: int
) -> list[tuple[float, float]]:
    """Return the seconds per call of both, in neighbouring blocks whose order alternates."""
    began = time.perf_counter()
    for step in steps:
        step()
    count = comm.bcast(max(1, round(_BLOCK_SECONDS / (time.perf_counter() - began))))
    found = []
    for k in range(rounds):
        seconds = [0.0, 0.0]
        for which in (0, 1) if k % 2 else (1, 0):
            comm.Barrier()
            began = time.perf_counter()
            for _ in range(count):
                steps[which]()
            seconds[which] = (time.perf_counter() - began) / count
        found.append((seconds[0], seconds[1]))
    return found


def _report(comm: MPI.Comm, nbytes: int, memory: str, found: list[tuple[float, float]]) -> None:
    if comm.rank == 0:
        medians = [1e6 * statistics.median(each) for each in zip(*found, strict=True)]
        low, middle, high = statistics.quantiles(mine / other for other, mine in found)
        print(
            f"{nbytes:>10} {memory:>9} | {medians[0]:10.1f} us | {medians[1]:10.1f} us | "
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
