"""Cluster resolver: the position of this process in its job, whatever the source."""

from __future__ import annotations

from dvkernels.cluster.position import Position
from dvkernels.cluster.spec import ClusterSpec

__all__ = ["ClusterResolver"]


class ClusterResolver:
    """Base class: this process's position in its job.

    Use a subclass, or pass a position of your own to this constructor.

    Parameters
    ----------
    source : str
        The origin of the information, for messages: a launcher or an environment variable.
    position : Position
        The position of this process.
    spec : ClusterSpec, optional
        The tasks, where the source names them all; else empty.

    Examples
    --------
    >>> import dvkernels as dv
    >>> hosts = {"worker": ["a:2222", "a:2223", "b:2222"]}
    >>> resolver = dv.cluster.SimpleClusterResolver(hosts, task_id=1)
    >>> resolver
    SimpleClusterResolver(explicit: worker 1 of 3, 1 of 2 on this host)
    >>> resolver.is_chief, resolver.cluster_spec().num_tasks("worker")
    (False, 3)
    """

    def __init__(self, source: str, position: Position, spec: ClusterSpec | None = None) -> None:
        self._source = source
        self._position = position
        self._spec = ClusterSpec({}) if spec is None else spec

    @property
    def source(self) -> str:
        """The origin of the information: a launcher or an environment variable."""
        return self._source

    @property
    def task_type(self) -> str:
        """The name of this process's job; ``"worker"`` under MPI, Slurm and Kubernetes."""
        return self._position.task_type

    @property
    def task_id(self) -> int:
        """The index of this process in its job."""
        return self._position.task_id

    @property
    def worker_id(self) -> int | None:
        """The number among all workers, the chief first; None for a task that is not a worker."""
        return self._position.worker_id

    @property
    def num_workers(self) -> int:
        """The number of workers, the chief included."""
        return self._position.num_workers

    @property
    def local_rank(self) -> int | None:
        """The number among the workers of this host; None if unknown."""
        return self._position.local_rank

    @property
    def num_local_workers(self) -> int | None:
        """The number of workers of this host; None if unknown."""
        return self._position.num_local_workers

    @property
    def is_chief(self) -> bool:
        """Whether this is the first worker, which does what is to be done once per job."""
        return self._position.worker_id == 0

    def cluster_spec(self) -> ClusterSpec:
        """Return the tasks; an empty spec if the source does not name them."""
        return self._spec

    def __repr__(self) -> str:
        if self.worker_id is None:
            return f"{type(self).__name__}({self.source}: {self.task_type} {self.task_id})"
        here = ""
        if self.num_local_workers is not None:
            here = f", {self.local_rank} of {self.num_local_workers} on this host"
        return (
            f"{type(self).__name__}({self.source}: worker {self.worker_id} of "
            f"{self.num_workers}{here})"
        )
