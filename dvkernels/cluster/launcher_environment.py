"""Environment variables by which MPI launchers and Slurm describe a job to its processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from dvkernels.cluster import slurm_counts
from dvkernels.cluster.position import Position
from dvkernels.errors import ClusterError

__all__ = [
    "GROUP",
    "LOCAL",
    "RANK",
    "SIZE",
    "SRUN",
    "TOKEN",
    "Environment",
    "find",
    "number",
    "slurm_position",
    "why_not_found",
]

Environment: TypeAlias = Mapping[str, str]

SRUN = "srun"
LOCAL = "local"  # launch --engine local, and dv.launch
# The file and the secret of its host group, and the place of a process in it.
GROUP, TOKEN = "DVKERNELS_GROUP", "DVKERNELS_GROUP_TOKEN"
RANK, SIZE = "DVKERNELS_GROUP_RANK", "DVKERNELS_GROUP_SIZE"


class _Variables(NamedTuple):
    """Names of a launcher's environment variables."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    num_local: str


# These take precedence over srun: inside a Slurm allocation Hydra and Open MPI start their daemons
# with srun, and the ranks inherit the daemons' SLURM variables.
_LAUNCHERS = (
    _Variables(LOCAL, RANK, SIZE, RANK, SIZE),
    _Variables(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Variables("Hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def find(environ: Environment) -> tuple[str, Position] | None:
    """Return the launcher of this process and its position; None if no launcher started it."""
    for names in _LAUNCHERS:
        if names.rank in environ and names.local_rank in environ:
            return names.launcher, _launched_position(environ, names)
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        return SRUN, slurm_position(environ)
    if "PMI_RANK" in environ and "PMI_SIZE" in environ:  # a PMI process manager without local ranks
        size = number(environ, "PMI_SIZE", 1)
        rank = number(environ, "PMI_RANK", 0, size)
        return "PMI", Position("worker", rank, rank, size, None, None)
    return None


def _launched_position(environ: Environment, names: _Variables) -> Position:
    size = number(environ, names.size, 1)
    rank = number(environ, names.rank, 0, size)
    num_local = number(environ, names.num_local, 1, size + 1)
    local_rank = number(environ, names.local_rank, 0, num_local)
    return Position("worker", rank, rank, size, local_rank, num_local)


def why_not_found(environ: Environment) -> str:
    """Return the message that says why ``find`` found no launcher."""
    if "PMIX_RANK" in environ:
        return (
            f"PMIX_RANK={environ['PMIX_RANK']!r} says that a PMIx launcher started this process, "
            f"but none of its variables gives the number of processes; pass a SimpleClusterResolver"
        )
    variables = ", ".join(names.rank for names in _LAUNCHERS if names.launcher != LOCAL)
    return (
        f"no MPI launcher started this process: none of {variables}, SLURM_PROCID (with "
        f"SLURM_STEP_NUM_TASKS) is set; start it with mpiexec, srun or python -m dvkernels launch"
    )


def slurm_position(environ: Environment) -> Position:
    """Return the position of a task of a Slurm job step."""
    size = number(environ, "SLURM_STEP_NUM_TASKS", 1)
    rank = number(environ, "SLURM_PROCID", 0, size)
    num_local, name = None, "SLURM_STEP_TASKS_PER_NODE"
    if name in environ:
        counts = slurm_counts.expand(name, environ[name])
        if sum(counts) != size:
            raise ClusterError(
                f"{name}: {environ[name]!r} adds up to {sum(counts)} tasks, but "
                f"SLURM_STEP_NUM_TASKS is {size}"
            )
        num_local = counts[number(environ, "SLURM_NODEID", 0, len(counts))]
    local_rank = number(environ, "SLURM_LOCALID", 0, num_local or size)
    return Position("worker", rank, rank, size, local_rank, num_local)


def number(environ: Environment, name: str, low: int, end: int | None = None) -> int:
    """Return a variable's value as an integer in ``range(low, end)``; anything else raises."""
    expected = f"an integer from {low}" + ("" if end is None else f" to {end - 1}")
    if name not in environ:
        raise ClusterError(f"{name} is not set; expected {expected}")
    text = environ[name]
    number = int(text) if text.isascii() and text.isdecimal() else -1
    if number < low or (end is not None and number >= end):
        raise ClusterError(f"{name}: expected {expected}; got {text!r}")
    return number
