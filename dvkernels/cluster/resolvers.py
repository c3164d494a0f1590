"""Cluster resolvers: one for each source that describes the job to its processes.

Every resolver reads its source once, in the constructor, and does not communicate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, final

from dvkernels.cluster import launcher_environment
from dvkernels.cluster.host_group import HostGroup
from dvkernels.cluster.position import Position, position_in
from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.cluster.spec import ClusterSpec, Tasks
from dvkernels.errors import ClusterError

__all__ = [
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


@final
class SimpleClusterResolver(ClusterResolver):
    """Resolver of a cluster that the program describes itself.

    Parameters
    ----------
    cluster_spec : ClusterSpec or mapping
        The addresses of all tasks; ``{}`` for a single worker. The tasks of the jobs ``chief`` (at
        most one) and ``worker`` are workers, all others are not.
    task_type : str, optional
        The job of this process; ``"worker"`` if not given.
    task_id : int, optional
        The index of this process in its job. Optional if the job has one task.

    Raises
    ------
    ClusterError
        The spec is malformed or has no such task.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.cluster.SimpleClusterResolver({"worker": ["a:2222", "b:2222"]}, task_id=0)
    SimpleClusterResolver(explicit: worker 0 of 2, 0 of 1 on this host)
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
    """Resolver of a cluster described as JSON in ``DVKERNELS_CLUSTER`` or ``TF_CONFIG``.

    The format is TensorFlow's:
    ``{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": "worker", "index": 0}}``.
    ``rpc_layer`` and ``environment`` are accepted and ignored. ``DVKERNELS_CLUSTER`` takes
    precedence. If neither is set, or it is empty or ``{}``, this process is a single worker.

    Parameters
    ----------
    task_type, task_id : str, int, optional
        Override the variable's ``task``.
    environ : mapping from str to str, optional
        The environment; that of this process if not given.

    Raises
    ------
    ClusterError
        The JSON is malformed; the message names the variable and the fault.

    Examples
    --------
    >>> import dvkernels as dv
    >>> config = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'
    >>> dv.cluster.TFConfigClusterResolver(environ={"TF_CONFIG": config})
    TFConfigClusterResolver(TF_CONFIG: worker 1 of 2, 0 of 1 on this host)
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
    """Resolver of a Slurm job step, from the variables that ``srun`` sets.

    Parameters
    ----------
    environ : mapping from str to str, optional
        The environment; that of this process if not given.

    Raises
    ------
    ClusterError
        This process is not a task of a job step, or a variable is malformed.

    Examples
    --------
    >>> import dvkernels as dv
    >>> step = {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    >>> dv.cluster.SlurmClusterResolver(environ=step).worker_id
    2
    """

    def __init__(self, *, environ: launcher_environment.Environment | None = None) -> None:
        environ = os.environ if environ is None else environ
        super().__init__(launcher_environment.SRUN, launcher_environment.slurm_position(environ))


@final
class MPIClusterResolver(ClusterResolver):
    """Resolver of an MPI job, from the variables that its launcher sets; MPI is not loaded.

    Supports the launchers of Open MPI, MPICH and Intel MPI (Hydra), and ``srun``.

    Parameters
    ----------
    environ : mapping from str to str, optional
        The environment; that of this process if not given.

    Raises
    ------
    ClusterError
        No launcher started this process, or a variable is malformed.

    Examples
    --------
    >>> import dvkernels as dv
    >>> hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    >>> dv.cluster.MPIClusterResolver(environ=hydra)
    MPIClusterResolver(Hydra: worker 1 of 2, 1 of 2 on this host)
    """

    def __init__(self, *, environ: launcher_environment.Environment | None = None) -> None:
        environ = os.environ if environ is None else environ
        found = launcher_environment.find(environ)
        if found is None or found[0] == launcher_environment.LOCAL:
            raise ClusterError(launcher_environment.why_not_found(environ))
        super().__init__(*found)


@final
class KubernetesClusterResolver(ClusterResolver):
    """Resolver of an indexed Kubernetes Job, with one worker per pod.

    Kubernetes gives a pod its index but not the number of pods, so the manifest must repeat it in
    the variable ``DVKERNELS_NUM_WORKERS``. Under the MPI Operator a worker is an MPI rank: use
    :class:`MPIClusterResolver` there.

    Parameters
    ----------
    num_workers : int, optional
        The Job's ``completions``; the variable ``DVKERNELS_NUM_WORKERS`` if not given.
    environ : mapping from str to str, optional
        The environment; that of this process if not given.

    Raises
    ------
    ClusterError
        This process is not in a pod of an indexed Job, the number of workers is unknown, or a
        variable is malformed.

    Examples
    --------
    >>> import dvkernels as dv
    >>> pod = {"JOB_COMPLETION_INDEX": "1", "DVKERNELS_NUM_WORKERS": "4"}
    >>> dv.cluster.KubernetesClusterResolver(environ=pod)
    KubernetesClusterResolver(Kubernetes: worker 1 of 4, 0 of 1 on this host)
    """

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        environ: launcher_environment.Environment | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        if _COMPLETION_INDEX not in environ:
            raise ClusterError(
                f"{_COMPLETION_INDEX} is not set: this is not a pod of a Job with completionMode: "
                f"Indexed"
            )
        if num_workers is None:
            if _NUM_WORKERS not in environ:
                raise ClusterError(
                    f"{_NUM_WORKERS} is not set, and Kubernetes does not give a pod the number of "
                    f"pods: set it to the Job's completions, or pass num_workers"
                )
            num_workers = launcher_environment.number(environ, _NUM_WORKERS, 1)
        given: object = num_workers
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise ClusterError(f"num_workers: expected an integer from 1; got {given!r}")
        index = launcher_environment.number(environ, _COMPLETION_INDEX, 0, num_workers)
        # A pod counts as a host with one worker.
        position = Position(task_id=index, worker_id=index, num_workers=num_workers)
        super().__init__("Kubernetes", position)


def default_resolver(environ: launcher_environment.Environment | None = None) -> ClusterResolver:
    """Return the resolver that fits the environment of this process.

    The first that applies of: ``launch --engine local``; an MPI launcher or ``srun``; the JSON in
    ``DVKERNELS_CLUSTER`` or ``TF_CONFIG``; an indexed Kubernetes Job whose manifest sets
    ``DVKERNELS_NUM_WORKERS`` (pods of other Jobs are independent); a single worker.

    Parameters
    ----------
    environ : mapping from str to str, optional
        The environment; that of this process if not given.

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
        launcher, position = found
        if launcher == launcher_environment.LOCAL:
            return _local_group(environ, position)
        by_srun = launcher == launcher_environment.SRUN
        return (SlurmClusterResolver if by_srun else MPIClusterResolver)(environ=environ)
    if environ.get(_OWN_CONFIG, "").strip() or environ.get(_TF_CONFIG, "").strip():
        return TFConfigClusterResolver(environ=environ)
    if _COMPLETION_INDEX in environ and _NUM_WORKERS in environ:
        return KubernetesClusterResolver(environ=environ)
    return SimpleClusterResolver({})


def _local_group(environ: launcher_environment.Environment, position: Position) -> HostGroup:
    group, token = launcher_environment.GROUP, launcher_environment.TOKEN
    for name in (group, token):
        if not environ.get(name):
            raise ClusterError(f"{name} is not set, as launch --engine local does")
    return HostGroup(environ[group], position.task_id, position.num_workers, environ[token])


def _parsed_config(name: str, text: str) -> dict[str, Any]:
    """Return the JSON object in a variable; raise if it is malformed or has unknown keys."""
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
