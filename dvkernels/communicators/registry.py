"""Registry of communicators: one table from names to algorithms, and their construction."""

from __future__ import annotations

import functools
import importlib
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

from dvkernels.cluster.host_group import HostGroup
from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.bucketing import Bucketing
from dvkernels.communicators.hierarchical import Hierarchical
from dvkernels.communicators.local import Local
from dvkernels.communicators.single import Single
from dvkernels.communicators.workers.shm import available
from dvkernels.devices import jax_devices
from dvkernels.devices.device import Device
from dvkernels.errors import AlgorithmError, ClusterError
from dvkernels.threads import shielded

__all__: list[str] = []

# cross_device_ops by name -> the algorithm of dvkernels.kernels.all_reduce.
# Over several workers every reduction is hierarchical, so "hierarchical" means "auto".
_ALGORITHMS = {"auto": "auto", "direct": "direct", "hierarchical": "auto", "ring": "ring"}

# cross_device_ops by name -> the algorithm between hosts; for other names the cost model of
# schedules/cost_model.py chooses.
_BETWEEN_HOSTS = {"direct": "exchange", "ring": "ring"}


def between_workers(
    resolver: ClusterResolver, timeout_seconds: float, cross_device_ops: object = "auto"
) -> Workers:
    """Return the communicator of a job's workers, or ``Single`` for one worker.

    A host group needs no MPI, all others do.

    Raises
    ------
    AlgorithmError
        Workers ask for different algorithms between hosts. Raised on all workers.
    ClusterError, CollectiveTimeoutError
        See ``workers.connect.connect`` and ``workers.shm.roll_call.connect``.
    """
    if resolver.worker_id is None:
        raise ClusterError(
            f"expected a worker, and {resolver!r} is another task; make this strategy in the "
            f"chief and the workers only"
        )
    if resolver.num_workers == 1:
        return Single()
    algorithm = _BETWEEN_HOSTS.get(_name_of(cross_device_ops), "auto")
    if isinstance(resolver, HostGroup):
        # Not where Ctrl-C would leave the lock of an import taken.
        roll_call = shielded.beyond_interrupts(
            importlib.import_module, "dvkernels.communicators.workers.shm.roll_call"
        )
        workers: Workers = roll_call.connect(resolver, timeout_seconds, algorithm)
        return workers
    available.check_for_mpi(resolver, os.environ, platform.node())
    try:
        from dvkernels.communicators.workers import connect
    except ImportError as error:
        raise ClusterError(
            f"{resolver!r} has several workers, which communicate by MPI: install mpi4py and an "
            f"MPI (pip install 'dvkernels[mpi]' mpich); importing it failed: {error}"
        ) from error
    return connect.connect(resolver, timeout_seconds, algorithm)


def between_jax_processes(timeout_seconds: float) -> Workers:
    """Return the communicator of the processes of ``jax.distributed``, or ``Single`` for one.

    Raises
    ------
    ClusterError, CollectiveTimeoutError
        See ``jax.coordination_service.connect``.
    """
    if jax_devices.num_processes() == 1:
        return Single()
    from dvkernels.communicators.jax import coordination_service

    return coordination_service.connect(timeout_seconds)


def for_any_memory(workers: Workers, are_on_gpus: bool) -> Workers:
    """Return workers that take GPU arrays too, if some worker's replicas are on GPUs.

    Every worker calls this. Between workers GPU arrays are staged in host memory.
    """
    answers = workers.exchange(are_on_gpus)
    if len(answers) == 1 or not any(answers):
        return workers
    from dvkernels.communicators.workers.group import WorkerGroup
    from dvkernels.communicators.workers.staged import Staged

    assert isinstance(workers, WorkerGroup)  # of several workers
    return Staged(workers)


def between_all(
    devices: Sequence[Device],
    cross_device_ops: object,
    workers: Workers,
    bytes_per_bucket: int | None = None,
    mesh: Any = None,
) -> tuple[list[int], Communicator, Communicator]:
    """Return the number of replicas of each worker, and two communicators of all replicas.

    The second communicator is for the progress thread. Every worker calls this, with the devices of
    its own replicas, and with the mesh of all of them if they are JAX's.

    Raises
    ------
    AlgorithmError
        Some workers ask for NCCL and others do not. Raised on all workers.
    """
    asks_for_nccl = _name_of(cross_device_ops) == "nccl"
    if mesh is not None and not isinstance(cross_device_ops, Communicator):
        if asks_for_nccl or bytes_per_bucket:
            raise AlgorithmError(
                "replicas on JAX devices communicate through XLA, without buckets: use "
                "cross_device_ops='auto'"
            )
        return _between_jax_devices(devices, cross_device_ops, workers, mesh)
    local = between_devices(devices, "auto" if asks_for_nccl else cross_device_ops)
    answers = workers.exchange((len(devices), asks_for_nccl))
    counts = [count for count, _ in answers]
    asking = [worker for worker, (_, asks) in enumerate(answers) if asks]
    if 0 < len(asking) < len(answers):
        others = [worker for worker in range(len(answers)) if worker not in asking]
        raise AlgorithmError(
            f"cross_device_ops='nccl' connects the GPUs of all workers: workers {asking} ask for "
            f"it, and workers {others} do not; give all of them the same"
        )
    main = between_replicas(local, workers, counts)
    background = between_replicas(local, workers.duplicate(), counts)
    if asks_for_nccl:
        from dvkernels.communicators.nccl import communicator as nccl

        main = nccl.Nccl(devices, workers=workers, fallback=main)
        # NCCL needs one order of calls on all workers, and a second thread has its own order.
        background = main if workers.size == 1 else background
    return (
        counts,
        _with_buckets(main, bytes_per_bucket),
        _with_buckets(background, bytes_per_bucket),
    )


def between_replicas(
    local: Communicator,
    workers: Workers,
    replicas_of_workers: Sequence[int],
    bytes_per_bucket: int | None = None,
) -> Communicator:
    """Return the communicator of all replicas of all workers.

    ``local`` is the communicator of this worker's replicas. Many arrays are packed into buckets if
    ``bytes_per_bucket`` is given.
    """
    communicator = local
    if workers.size > 1:
        communicator = Hierarchical(local, workers, replicas_of_workers)
    return _with_buckets(communicator, bytes_per_bucket)


def _with_buckets(communicator: Communicator, bytes_per_bucket: int | None) -> Communicator:
    return communicator if bytes_per_bucket is None else Bucketing(communicator, bytes_per_bucket)


def between_devices(devices: Sequence[Device], cross_device_ops: object) -> Communicator:
    """Return the communicator of the replicas of this process, one on each device.

    ``cross_device_ops`` is the name of an algorithm of this package, or an object of the
    :class:`Communicator` protocol.
    """
    num_replicas, name = len(devices), _name_of(cross_device_ops)
    if name in _ALGORITHMS:
        return Single() if num_replicas == 1 else Local(num_replicas, _ALGORITHMS[name])
    if isinstance(cross_device_ops, Communicator):
        if cross_device_ops.size != num_replicas:
            raise AlgorithmError(
                f"the communicator has {cross_device_ops.size} ranks, the strategy "
                f"{num_replicas} replicas; make one of the same size"
            )
        return cross_device_ops
    raise AlgorithmError(
        f"expected cross_device_ops to be one of {sorted([*_ALGORITHMS, 'nccl'])} or an object "
        f"with the methods of dvkernels.Communicator, got {cross_device_ops!r}"
    )


def _between_jax_devices(
    devices: Sequence[Device], cross_device_ops: object, workers: Workers, mesh: Any
) -> tuple[list[int], Communicator, Communicator]:
    """Return what ``between_all`` does, for JAX devices; XLA chooses its algorithms."""
    from dvkernels.communicators.jax.shard_map import ShardMap

    local = between_devices(devices, cross_device_ops)  # of host memory
    counts = workers.exchange(len(devices))
    first = sum(counts[: workers.rank])
    main = ShardMap(devices, between_replicas(local, workers, counts), mesh, workers, first)
    if workers.size == 1:
        return counts, main, main
    others = workers.duplicate()
    host = between_replicas(local, others, counts)
    return counts, main, ShardMap(devices, host, mesh, others, first, in_background=True)


def algorithm_namer(communicator: Communicator) -> Callable[[int, int], str]:
    """Return a function that names the algorithm of an all-reduce on the host, for traces.

    Its arguments are the number of replicas and the bytes of each.
    """
    return functools.partial(_algorithm_of, communicator)


def _algorithm_of(communicator: Communicator, num_replicas: int, nbytes: int) -> str:
    if isinstance(communicator, Bucketing):
        return f"buckets, {_algorithm_of(communicator.communicator, num_replicas, nbytes)}"
    if isinstance(communicator, Hierarchical):
        return f"hierarchical, {_algorithm_of(communicator.local, num_replicas, nbytes)}"
    if isinstance(communicator, Local):
        return "direct" if communicator.algorithm == "auto" else communicator.algorithm
    return type(communicator).__name__.lower()


def _name_of(cross_device_ops: object) -> str:
    """Return ``cross_device_ops`` in lower case, or "" if it is not a name."""
    return cross_device_ops.lower() if isinstance(cross_device_ops, str) else ""
