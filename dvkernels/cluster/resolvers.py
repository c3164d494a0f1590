"""Who is this process among the workers of its job: told by whoever started it.

Every resolver reads its source once, when it is made, and communicates with nobody.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, final

from dvkernels.cluster import launcher_environment
from dvkernels.cluster.position import Position, position_in, worker_addresses
from dvkernels.cluster.spec import ClusterSpec, Tasks
from dvkernels.errors import ClusterError

__all__ = [
    "ClusterResolver",
    "KubernetesClusterResolver",
    "MPIClusterResolver",
    "SimpleClusterResolver",
    "SlurmClusterResolver",
    "TFConfigClusterResolver",
    "default_resolver",
]

_OWN_CONFIG, _TF_CONFIG = "DVKERNELS_CLUSTER", "TF_CONFIG"
_NUM_WORKERS = "DVKERNELS_NUM_WORKERS"
_COMPLETION_INDEX = "JOB_COMPLETION_INDEX"


class ClusterResolver:
    """What one process knows of its job. Use a subclass, or hand in what you know by yourself.

    Parameters
    ----------
    source : str
        Who told it, for messages: a launcher or a variable.
    position : Position
        Where this process stands.
    spec : ClusterSpec, optional
        The addresses of all tasks; empty where nobody knows them.

    Examples
    --------
    >>> import dvkernels as dv
    >>> hosts = {"worker": ["a:2222", "a:2223", "b:2222"]}
    >>> resolver = dv.cluster.SimpleClusterResolver(hosts, task_id=1)
    >>> resolver
    SimpleClusterResolver(explicit: worker 1 of 3, 1 of 2 on this host)
    >>> resolver.is_chief, resolver.addresses
    (False, ('a:2222', 'a:2223', 'b:2222'))
    """

    def __init__(self, source: str, position: Position, spec: ClusterSpec | None = None) -> None:
        self._source = source
        self._position = position
        self._spec = ClusterSpec({}) if spec is None else spec

    @property
    def source(self) -> str:
        """Who told it: a launcher or a variable."""
        return self._source

    @property
    def task_type(self) -> str:
        """The name of this process's job: ``"worker"`` where there is only one kind."""
        return self._position.task_type

    @property
    def task_id(self) -> int:
        """The index of this process in its job."""
        return self._position.task_id

    @property
    def worker_id(self) -> int | None:
        """The number among the workers, the chief first; None for a task that is no worker."""
        return self._position.worker_id

    @property
    def num_workers(self) -> int:
        """How many workers there are, the chief included."""
        return self._position.num_workers

    @property
    def local_rank(self) -> int | None:
        """The number among the workers of this host; None if nobody told."""
        return self._position.local_rank

    @property
    def num_local_workers(self) -> int | None:
        """How many workers this host has; None if nobody told."""
        return self._position.num_local_workers

    @property
    def is_chief(self) -> bool:
        """Whether this is the worker that writes what is written once."""
        return self._position.worker_id == 0

    @property
    def addresses(self) -> tuple[str, ...] | None:
        """The workers' addresses in the order of ``worker_id``; None if nobody told."""
        return worker_addresses(self._spec) or None

    def cluster_spec(self) -> ClusterSpec:
        """Return the addresses of all tasks; empty if nobody told."""
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


@final
class SimpleClusterResolver(ClusterResolver):
    """A cluster that the program itself spells out.

    Parameters
    ----------
    cluster_spec : ClusterSpec or mapping
        The addresses of all tasks; ``{}`` for one worker alone. Jobs ``chief`` (at most one task)
        and ``worker`` are workers, all others are not.
    task_type : str, optional
        The job of this process: ``"worker"`` if not given.
    task_id : int, optional
        The index of this process in its job. May be left out if the job has one task.

    Raises
    ------
    ClusterError
        The spec is malformed or has no such task.
    """

    def __init__(
        self,
        cluster_spec: ClusterSpec | Mapping[str, Tasks],
        *,
        task_type: str | None = None,
        task_id: int | None = None,
    ) -> None:
        spec = ClusterSpec(cluster_spec)
        super().__init__(
            "explicit", position_in(spec, task_type, task_id, "the cluster spec"), spec
        )


@final
class TFConfigClusterResolver(ClusterResolver):
    """A cluster spelt out as JSON in ``DVKERNELS_CLUSTER``, or else in ``TF_CONFIG``.

    ``{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": "worker", "index": 0}}``, as
    TensorFlow has it; ``rpc_layer`` and ``environment`` are accepted and mean nothing here. A
    variable that is not set, empty, or ``{}`` means one worker alone.

    Parameters
    ----------
    task_type, task_id : str, int, optional
        Instead of what the variable says.
    environ : mapping, optional
        The variables; those of this process if not given.

    Raises
    ------
    ClusterError
        The variable is no such JSON. The message names the variable and what is wrong in it.
    """

    def __init__(
        self,
        *,
        task_type: str | None = None,
        task_id: int | None = None,
        environ: launcher_environment.Environment | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        name = _OWN_CONFIG if environ.get(_OWN_CONFIG, "").strip() else _TF_CONFIG
        config = _parsed_config(name, environ.get(name, ""))
        task = config.get("task") or {}
        if not isinstance(task, dict):
            raise ClusterError(f'{name}: expected "task" to be an object; got {task!r}')
        try:
            spec = ClusterSpec(config.get("cluster") or {})
        except ClusterError as error:
            raise ClusterError(f"{name}: {error}") from None
        if task_type is None:
            task_type = task.get("type")
            if task_type is not None and not isinstance(task_type, str):
                raise ClusterError(
                    f'{name}: expected the "type" of the task to be a string; got {task_type!r}'
                )
        if task_id is None and "index" in task:
            task_id = _task_index(name, task["index"])
        super().__init__(name, position_in(spec, task_type, task_id, name), spec)


@final
class SlurmClusterResolver(ClusterResolver):
    """The tasks of a Slurm job step, as ``srun`` describes it to each.

    Parameters
    ----------
    port : int
        The port of the first task of each node; the next task of that node gets the next one.
    environ : mapping, optional
        The variables; those of this process if not given.

    Raises
    ------
    ClusterError
        This is no task of a job step, or a variable is malformed.

    Notes
    -----
    The addresses are known where tasks lie on the nodes in blocks or in turn (``--distribution``
    ``block`` or ``cyclic``), and None elsewhere.
    """

    def __init__(
        self, *, port: int = 8888, environ: launcher_environment.Environment | None = None
    ) -> None:
        environ = os.environ if environ is None else environ
        super().__init__(
            launcher_environment.SRUN,
            launcher_environment.slurm_position(environ),
            launcher_environment.slurm_spec(environ, _port(port)),
        )


@final
class MPIClusterResolver(ClusterResolver):
    """The ranks of an MPI job, as its launcher describes them, without MPI being loaded.

    Known are Open MPI, MPICH and Intel MPI (Hydra), and ``srun``.

    Parameters
    ----------
    environ : mapping, optional
        The variables; those of this process if not given.

    Raises
    ------
    ClusterError
        No launcher started this process, or a variable is malformed.
    """

    def __init__(self, *, environ: launcher_environment.Environment | None = None) -> None:
        environ = os.environ if environ is None else environ
        found = launcher_environment.find(environ)
        if found is None:
            raise ClusterError(launcher_environment.why_none(environ))
        super().__init__(*found)


@final
class KubernetesClusterResolver(ClusterResolver):
    """The pods of an indexed Kubernetes Job, one worker each.

    Kubernetes tells a pod its index but not how many there are: the manifest says it once more in
    the variable ``DVKERNELS_NUM_WORKERS``. Under the MPI Operator a worker is a rank of MPI:
    use :class:`MPIClusterResolver` there.

    Parameters
    ----------
    num_workers : int, optional
        ``completions`` of the Job; the variable ``DVKERNELS_NUM_WORKERS`` if not given.
    service : str, optional
        The headless service that names the pods, ``subdomain`` of their template; the variable
        ``DVKERNELS_SERVICE`` if not given. Without it no addresses are known.
    port : int
        The port of every pod.
    environ : mapping, optional
        The variables; those of this process if not given.

    Raises
    ------
    ClusterError
        This is no pod of an indexed Job, the number of workers is not known, or a variable is
        malformed.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        service: str | None = None,
        port: int = 8888,
        environ: launcher_environment.Environment | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        if _COMPLETION_INDEX not in environ:
            raise ClusterError(
                f"{_COMPLETION_INDEX} is not set: this is no pod of a Job with completionMode: "
                f"Indexed"
            )
        if num_workers is None:
            if _NUM_WORKERS not in environ:
                raise ClusterError(
                    f"{_NUM_WORKERS} is not set, and Kubernetes does not tell a pod how many there "
                    f"are: set it to the Job's completions, or pass num_workers"
                )
            num_workers = launcher_environment.number(environ, _NUM_WORKERS, 1)
        num_workers = _integer("num_workers", num_workers, 1, math.inf)
        index = launcher_environment.number(environ, _COMPLETION_INDEX, 0, num_workers)
        service = environ.get("DVKERNELS_SERVICE") if service is None else service
        # A pod is named for its Job and its index, and is alone: pods are hosts.
        job = environ.get("HOSTNAME", "").removesuffix(f"-{index}")
        spec: dict[str, Tasks] = {}
        if service and job and job != environ["HOSTNAME"]:
            spec["worker"] = [f"{job}-{k}.{service}:{_port(port)}" for k in range(num_workers)]
        position = Position(task_id=index, worker_id=index, num_workers=num_workers)
        super().__init__("Kubernetes", position, ClusterSpec(spec))


def default_resolver(environ: launcher_environment.Environment | None = None) -> ClusterResolver:
    """Return the resolver of whoever started this process.

    In this order: an MPI launcher or ``srun``; the JSON of ``DVKERNELS_CLUSTER`` or ``TF_CONFIG``;
    an indexed Kubernetes Job whose manifest sets ``DVKERNELS_NUM_WORKERS`` (others are jobs of
    independent pods); otherwise one worker alone.

    Parameters
    ----------
    environ : mapping, optional
        The variables; those of this process if not given.

    Raises
    ------
    ClusterError
        The variables of that source are malformed.

    Examples
    --------
    >>> import dvkernels as dv
    >>> started_by_open_mpi = {
    ...     "OMPI_COMM_WORLD_RANK": "3",
    ...     "OMPI_COMM_WORLD_SIZE": "4",
    ...     "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    ...     "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    ... }
    >>> dv.cluster.default_resolver(started_by_open_mpi)
    MPIClusterResolver(Open MPI: worker 3 of 4, 1 of 2 on this host)
    >>> dv.cluster.default_resolver({})
    SimpleClusterResolver(explicit: worker 0 of 1, 0 of 1 on this host)
    """
    environ = os.environ if environ is None else environ
    found = launcher_environment.find(environ)
    if found is not None:
        by_srun = found[0] == launcher_environment.SRUN
        return (SlurmClusterResolver if by_srun else MPIClusterResolver)(environ=environ)
    if environ.get(_OWN_CONFIG, "").strip() or environ.get(_TF_CONFIG, "").strip():
        return TFConfigClusterResolver(environ=environ)
    if _COMPLETION_INDEX in environ and _NUM_WORKERS in environ:
        return KubernetesClusterResolver(environ=environ)
    return SimpleClusterResolver({})


def _parsed_config(name: str, text: str) -> dict[str, Any]:
    """Return the object that the JSON of a variable is."""
    try:
        config = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise ClusterError(f"{name}: expected JSON; {error} in {text!r}") from None
    known = ("cluster", "task", "rpc_layer", "environment")
    if not isinstance(config, dict) or not config.keys() <= set(known):
        raise ClusterError(
            f"{name}: expected a JSON object with the keys {', '.join(known)}; got {text!r}"
        )
    return config


def _task_index(name: str, index: object) -> int:
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, int):
        raise ClusterError(
            f'{name}: expected the "index" of the task to be an integer; got {index!r}'
        )
    return index


def _integer(name: str, value: object, low: int, high: float) -> int:
    """Return an argument that must be an integer in a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limits = f"from {low}" + (f" to {high}" if high < math.inf else "")
        raise ClusterError(f"{name}: expected an integer {limits}; got {value!r}")
    return value


def _port(port: object) -> int:
    return _integer("port", port, 1, 65535)
