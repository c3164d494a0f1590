"""Position of a task in a cluster: its job, worker number and local rank."""

from __future__ import annotations

from dataclasses import dataclass

from dvkernels.cluster.spec import ClusterSpec, host_of
from dvkernels.errors import ClusterError

__all__ = ["Position", "position_in"]

_CHIEF, _WORKER = "chief", "worker"
# Not a task of the cluster spec: it evaluates checkpoints while the workers train.
_EVALUATOR = "evaluator"


@dataclass(frozen=True)
class Position:
    """Position of one task among the workers.

    Attributes
    ----------
    task_type, task_id : str, int
        The name of the job, and the index of the task in it.
    worker_id : int or None
        The number among all workers, the chief first; None for a task that is not a worker.
    num_workers : int
        The number of workers, the chief included.
    local_rank, num_local_workers : int or None
        The number among the workers of this host, and the number of these; None if unknown.
    """

    task_type: str = _WORKER
    task_id: int = 0
    worker_id: int | None = 0
    num_workers: int = 1
    local_rank: int | None = 0
    num_local_workers: int | None = 1


def position_in(
    spec: ClusterSpec, task_type: str | None, task_id: int | None, source: str
) -> Position:
    """Return the position of one task of a spec. Hosts are identified by their addresses.

    Parameters
    ----------
    spec : ClusterSpec
        All tasks. Those of the jobs ``chief`` and ``worker`` are workers. Empty: a single worker.
    task_type, task_id : str, int, optional
        The task. Without a type it is a worker; without an id, the only task of its type.
    source : str
        The origin of the spec, for messages.

    Raises
    ------
    ClusterError
        There is no such task, or the task is ambiguous.
    """
    if not spec.jobs and task_type in (None, _CHIEF, _WORKER) and task_id in (None, 0):
        return Position(task_type or _WORKER)
    if spec.num_tasks(_CHIEF) > 1:
        raise ClusterError(f"{source}: expected at most one chief; got {spec}")
    workers = [(job, index) for job in (_CHIEF, _WORKER) for index in spec.task_indices(job)]
    if task_type == _EVALUATOR:
        return Position(task_type, task_id or 0, None, len(workers), None, None)
    if task_type is None:
        task_type = _CHIEF if spec.jobs == (_CHIEF,) else _WORKER
    indices = spec.task_indices(task_type)
    if task_id is None and len(indices) == 1:
        task_id = indices[0]
    if task_id is None:
        raise ClusterError(
            f"{source}: give the index of the {task_type} that this process is; the tasks are "
            f"{spec}"
        )
    if task_id not in indices:
        raise ClusterError(f"{source}: this process cannot be {task_type} {task_id!r} of {spec}")
    if (task_type, task_id) not in workers:
        return Position(task_type, task_id, None, len(workers), None, None)
    worker_id = workers.index((task_type, task_id))
    hosts = [host_of(spec.task_address(job, index)) for job, index in workers]
    return Position(
        task_type,
        task_id,
        worker_id,
        len(workers),
        local_rank=hosts[:worker_id].count(hosts[worker_id]),
        num_local_workers=hosts.count(hosts[worker_id]),
    )
