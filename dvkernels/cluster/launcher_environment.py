"""Environment variables by which MPI launchers and Slurm describe a job to its processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from dvkernels.cluster import slurm_lists
from dvkernels.cluster.position import Position
from dvkernels.cluster.spec import ClusterSpec
from dvkernels.errors import ClusterError

__all__ = ["SRUN", "Environment", "find", "number", "slurm_position", "slurm_spec", "why_not_found"]

Environment: TypeAlias = Mapping[str, str]

SRUN = "srun"


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
    variables = ", ".join(names.rank for names in _LAUNCHERS)
    return (
        f"no MPI launcher started this process: none of {variables}, SLURM_PROCID (with "
        f"SLURM_STEP_NUM_TASKS) is set; start it with mpiexec, srun or python -m dvkernels launch"
    )


def slurm_position(environ: Environment) -> Position:
    """Return the position of a task of a Slurm job step."""
    size = number(environ, "SLURM_STEP_NUM_TASKS", 1)
    rank = number(environ, "SLURM_PROCID", 0, size)
    num_local = None
    if "SLURM_STEP_TASKS_PER_NODE" in environ:
        counts = _slurm_counts(environ, size)
        num_local = counts[number(environ, "SLURM_NODEID", 0, len(counts))]
    local_rank = number(environ, "SLURM_LOCALID", 0, num_local or size)
    return Position("worker", rank, rank, size, local_rank, num_local)


def _slurm_counts(environ: Environment, size: int) -> list[int]:
    """Return the number of tasks of each node of the job step."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    counts = slurm_lists.expand_counts(name, environ[name])
    if sum(counts) != size:
        raise ClusterError(
            f"{name}: {environ[name]!r} adds up to {sum(counts)} tasks, but "
            f"SLURM_STEP_NUM_TASKS is {size}"
        )
    return counts


def slurm_spec(environ: Environment, port: int) -> ClusterSpec:
    """Return the tasks' addresses; an empty spec where the variables do not give them."""
    layout = environ.get("SLURM_DISTRIBUTION", "block").partition(":")[0]
    nodes_name = "SLURM_STEP_NODELIST"
    if (
        layout not in ("block", "cyclic")
        or not {
            nodes_name,
            "SLURM_STEP_TASKS_PER_NODE",
        }
        <= environ.keys()
    ):
        return ClusterSpec({})
    counts = _slurm_counts(environ, number(environ, "SLURM_STEP_NUM_TASKS", 1))
    nodes = slurm_lists.expand_nodes(nodes_name, environ[nodes_name])
    if len(nodes) != len(counts):
        raise ClusterError(
            f"{nodes_name}: {environ[nodes_name]!r} names {len(nodes)} nodes, but "
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']!r} is for "
            f"{len(counts)}"
        )
    slots = [(node, local) for node, count in enumerate(counts) for local in range(count)]
    if layout == "cyclic":  # one task per node in turn, skipping full nodes
        slots.sort(key=lambda slot: (slot[1], slot[0]))
    return ClusterSpec({"worker": [f"{nodes[node]}:{port + local}" for node, local in slots]})


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
