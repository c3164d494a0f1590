"""Cluster specification: jobs, their tasks, and the address of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, final

from dvkernels.errors import ClusterError

__all__ = ["ClusterSpec", "Tasks", "host_of"]

Tasks: TypeAlias = Sequence[str] | Mapping[int, str]


@final
class ClusterSpec:
    """Immutable mapping of jobs to tasks to addresses, as ``tf.train.ClusterSpec``.

    Parameters
    ----------
    jobs : mapping from str to sequence of str or mapping from int to str, or ClusterSpec
        The addresses of each job's tasks, ``"host"`` or ``"host:port"``: a list in the order of
        task indices, or a mapping by index if some tasks are missing.

    Raises
    ------
    ClusterError
        A job's name is empty, an address is malformed, or two tasks have the same address.

    Examples
    --------
    >>> spec = ClusterSpec({"worker": ["a:2222", "b:2222"], "ps": {1: "c:2222"}})
    >>> spec.jobs, spec.num_tasks("worker"), spec.task_address("ps", 1)
    (('worker', 'ps'), 2, 'c:2222')
    """

    __slots__ = ("_tasks",)

    def __init__(self, jobs: Mapping[str, Tasks] | ClusterSpec) -> None:
        if isinstance(jobs, ClusterSpec):
            jobs = jobs.as_dict()
        if not isinstance(jobs, Mapping):
            raise ClusterError(
                f"a cluster is a mapping from a job's name to its tasks' addresses, such as "
                f'{{"worker": ["a:2222", "b:2222"]}}; got {jobs!r}'
            )
        self._tasks = {name: _addresses(name, tasks) for name, tasks in jobs.items()}
        owner: dict[str, str] = {}
        for name, tasks in self._tasks.items():
            for index, address in tasks.items():
                task = f"{name} {index}"
                if owner.setdefault(address, task) != task:
                    raise ClusterError(
                        f"each task needs an address of its own: {owner[address]} and {task} both "
                        f"have {address!r}; give them different ports"
                    )

    @property
    def jobs(self) -> tuple[str, ...]:
        """The names of the jobs, in the order given."""
        return tuple(self._tasks)

    def num_tasks(self, job: str) -> int:
        """Return the number of tasks of a job; 0 if there is no such job."""
        return len(self._tasks.get(job, ()))

    def task_indices(self, job: str) -> tuple[int, ...]:
        """Return the indices of a job's tasks in ascending order; empty if there is no such job."""
        return tuple(self._tasks.get(job, ()))

    def job_tasks(self, job: str) -> tuple[str, ...]:
        """Return the addresses of a job's tasks in the order of indices; empty if there is none."""
        return tuple(self._tasks.get(job, {}).values())

    def task_address(self, job: str, index: int) -> str:
        """Return the address of one task; raise ``ClusterError`` if there is no such task."""
        try:
            return self._tasks[job][index]
        except KeyError:
            raise ClusterError(f"there is no {job} {index} in {self}") from None

    def as_dict(self) -> dict[str, dict[int, str]]:
        """Return the addresses as a new dict by job and index."""
        return {name: dict(tasks) for name, tasks in self._tasks.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClusterSpec) and self._tasks == other._tasks

    def __hash__(self) -> int:
        return hash(frozenset((name, *tasks.items()) for name, tasks in self._tasks.items()))

    def __repr__(self) -> str:
        def shown(tasks: dict[int, str]) -> Tasks:
            return list(tasks.values()) if list(tasks) == list(range(len(tasks))) else tasks

        return f"ClusterSpec({ {name: shown(tasks) for name, tasks in self._tasks.items()} })"


def host_of(address: str) -> str:
    """Return the host of an address: ``host``, ``host:port`` or ``[v6]:port``."""
    host, colon, port = address.rpartition(":")
    has_port = colon and port.isdecimal() and (":" not in host or host.endswith("]"))
    return host if has_port else address


def _addresses(job: object, tasks: object) -> dict[int, str]:
    """Return the checked addresses of one job by ascending index."""
    if not isinstance(job, str) or not job:
        raise ClusterError(f"a job's name is a string that is not empty; got {job!r}")
    if isinstance(tasks, Mapping):
        by_index = dict(tasks)
    elif isinstance(tasks, Sequence) and not isinstance(tasks, (str, bytes)):
        by_index = dict(enumerate(tasks))
    else:
        raise ClusterError(
            f"job {job!r}: expected a list of addresses, or a dict from index to address; "
            f"got {tasks!r}"
        )
    for index, address in by_index.items():
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ClusterError(f"job {job!r}: a task's index is an integer from 0; got {index!r}")
        if not isinstance(address, str) or not address or address.split() != [address]:
            raise ClusterError(
                f'job {job!r}, task {index}: expected an address such as "host:2222"; '
                f"got {address!r}"
            )
    return dict(sorted(by_index.items()))
