"""Parameter servers: calls and rows by threads, over shared memory and over MPI, beside goals.

    cd asv_benchmarks && ../.venv/bin/python -m benchmarks.servers [PYTHON ...]

Each PYTHON is the interpreter of an environment with mpi4py and this package; the mpiexec beside it
starts the job. A job has a coordinator, one worker and one server, so figures over processes mean
what they say where three cores are free.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import dvkernels as dv
from benchmarks import rounds
from benchmarks.coordinator import Coordinator
from benchmarks.rows import Rows
from dvkernels.benchmarks.stopwatch import Samples, timed

NUM_CALLS, NUM_ROUNDS, NUM_ROWS, WIDTH = 1000, rounds(21), 1_000_000, 16
GOALS = {  # of the issue; of a rate the least, else the most
    "threads: a call [us]": 40.0,
    "threads: rows gathered and added [M/s]": 5.0,
    "rows added beside a loop in C": 1.2,
    "rows gathered beside a loop in C": 1.2,
    "MPI: a call [us]": 250.0,
    "MPI: 512 rows gathered [us]": 200.0,
    "MPI: 512 rows added [us]": 200.0,
}


def nothing() -> None:
    """Stand for a call."""


def job() -> dict[str, list[float]]:
    """Return figures of a job, by name one a round; all processes but the first end in here."""
    found: dict[str, list[float]] = {}
    with dv.ParameterServerStrategy(num_servers=1) as strategy:
        with strategy.scope():
            table = dv.Variable(np.zeros((NUM_ROWS, WIDTH), np.float32))
        coordinator = dv.ClusterCoordinator(strategy)

        def rows_both_ways(count):
            random = np.random.default_rng(0)
            ids, rows = random.integers(0, NUM_ROWS, count), np.ones((count, WIDTH), np.float32)
            calls = (lambda: table.gather_rows(ids), lambda: table.scatter_add(ids, rows))
            return [1e6 * timed(call, 50) for call in calls]

        def schedule_and_join():
            for _ in range(NUM_CALLS):
                coordinator.schedule(nothing)
            coordinator.join()

        for _ in range(NUM_ROUNDS):
            began = time.perf_counter()
            schedule_and_join()
            found.setdefault("a call [us]", []).append(
                1e6 * (time.perf_counter() - began) / NUM_CALLS
            )
            for count in (512, 13_312):
                both = coordinator.schedule(rows_both_ways, (count,)).fetch()
                for verb, value in zip(("gathered", "added"), both, strict=True):
                    found.setdefault(f"{count} rows {verb} [us]", []).append(value)
        began, used = time.perf_counter(), time.process_time()
        time.sleep(1.0)
        share = (time.process_time() - used) / (time.perf_counter() - began)
        found["part of a core of an idle coordinator"] = [share]
        table.scatter_sub([0], 1.0)
        assert table.read_value().sum(dtype=np.float64) > 0
    return found


def of_threads() -> dict[str, list[float]]:
    """Return the figures of threads of one process, and of the rows kernel beside C."""
    found: dict[str, list[float]] = {}

    def repeat(name: str, track: Callable[[], float], num_rounds: int) -> None:
        found[name] = [track() for _ in range(num_rounds)]

    benchmark = Coordinator()
    benchmark.setup()
    repeat("threads: a call [us]", benchmark.track_call, 5)
    repeat("threads: a call of a bare queue [us]", benchmark.track_call_of_a_bare_queue, 5)
    rate = benchmark.track_rows_gathered_and_added
    repeat("threads: rows gathered and added [M/s]", rate, 5)
    benchmark.teardown()
    rows = Rows()
    try:
        rows.setup(NUM_ROWS)
    except NotImplementedError as error:
        print(f"rows beside C: {error}", file=sys.stderr)
        return found
    added, gathered = rows.track_scatter_add_beside_c, rows.track_gather_rows_beside_c
    repeat("rows added beside a loop in C", lambda: added(NUM_ROWS), 5)
    repeat("rows gathered beside a loop in C", lambda: gathered(NUM_ROWS), 5)
    return found


def over_mpi(python: str) -> dict[str, list[float]]:
    """Return the figures of a job under the mpiexec beside an interpreter."""
    allowed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    here = Path(__file__).resolve().parent.parent
    folders = os.pathsep.join([str(here.parent), str(here)])
    mpiexec = str(Path(python).with_name("mpiexec"))
    command = [mpiexec, "-n", "3", python, "-m", "benchmarks.servers"]
    done = subprocess.run(
        [*command, "--job"], env=os.environ | allowed | {"PYTHONPATH": folders},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    _, _, written = done.stdout.rpartition("figures: ")
    figures: dict[str, list[float]] = json.loads(written)
    return figures


def main(pythons: list[str]) -> None:
    """Measure, and print medians, quartiles and goals."""
    if pythons == ["--job"]:
        print(f"figures: {json.dumps(job())}")
        return
    found = of_threads()
    for name, values in dv.launch(job, workers=3)[0].items():
        found[f"one host: {name}"] = values
    for python in pythons:
        for name, values in over_mpi(python).items():
            found[f"MPI of {python}: {name}"] = values
    for name, values in found.items():
        low, high = Samples(tuple(values)).quartiles
        key = f"MPI:{name.rpartition(':')[2]}" if name.startswith("MPI") else name
        goal = f", goal {GOALS[key]:g}" if key in GOALS else ""
        print(f"{name}: {statistics.median(values):.3g} ({low:.3g} to {high:.3g}){goal}")


if __name__ == "__main__":
    main(sys.argv[1:])
