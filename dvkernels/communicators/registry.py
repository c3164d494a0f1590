"""Which communicator a name stands for: one visible table."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

from dvkernels.cluster.resolvers import ClusterResolver
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.bucketing import Bucketing
from dvkernels.communicators.hierarchical import Hierarchical
from dvkernels.communicators.local import Local
from dvkernels.communicators.single import Single
from dvkernels.communicators.workers.gpu.staged import Staged
from dvkernels.communicators.workers.shm import available
from dvkernels.devices.base import Device
from dvkernels.errors import AlgorithmError, ClusterError

__all__: list[str] = []

# cross_device_ops by name -> the algorithm of dvkernels.kernels.all_reduce.
# Over several workers every reduction is hierarchical, so asking for it changes nothing.
_ALGORITHMS = {"auto": "auto", "direct": "direct", "hierarchical": "auto", "ring": "ring"}


# Between hosts: see schedules/cost_model.py. Other names leave it to the model.
_WAYS = {"direct": "exchange", "ring": "ring"}


def between_workers(
    resolver: ClusterResolver, timeout_seconds: float, cross_device_ops: object = "auto"
) -> Workers:
    """Return the workers of a job, which MPI brings together; of one worker, itself alone.

    Raises
    ------
    AlgorithmError
        ``cross_device_ops`` leads workers different ways between hosts: on all of them.
    ClusterError, CollectiveTimeoutError
        See ``mpi.connect``.
    """
    if resolver.worker_id is None:
        raise ClusterError(
            f"expected a worker, and {resolver!r} is another task; make this strategy in the "
            f"chief and the workers only"
        )
    if resolver.num_workers == 1:
        return Single()
    available.check_for_mpi(resolver, os.environ, platform.node())
    try:
        from dvkernels.communicators.workers import connect
    except ImportError as error:
        raise ClusterError(
            f"{resolver!r} has others to talk to, and MPI carries that: install mpi4py and an MPI "
            f"(pip install 'dvkernels[mpi]' mpich); importing it failed: {error}"
        ) from error
    return connect.connect(resolver, timeout_seconds, _WAYS.get(_named(cross_device_ops), "auto"))


def for_any_memory(workers: Workers, are_on_gpus: bool) -> Workers:
    """Return workers that take arrays of GPUs too, where those of some worker lie there.

    Every worker calls this. Where those of all lie there, and MPI takes them, nothing is staged.
    """
    told = workers.exchange(are_on_gpus)
    if len(told) == 1 or not any(told):
        return workers
    from dvkernels.communicators.workers.gpu.direct import GpuDirect
    from dvkernels.communicators.workers.group import WorkerGroup

    if all(told) and isinstance(workers, WorkerGroup) and workers.gpu_comms:
        return Staged(workers, straight=GpuDirect(workers))
    return Staged(workers)


def between_all(
    devices: Sequence[Device],
    cross_device_ops: object,
    workers: Workers,
    bytes_per_bucket: int | None = None,
) -> tuple[list[int], Communicator, Communicator]:
    """Return how many replicas each worker has, and the communicator of all of them, twice.

    The second is for a thread that reduces meanwhile. Every worker calls this, with the devices of
    its own replicas.

    Raises
    ------
    AlgorithmError
        Some workers ask for NCCL, and others do not: on all of them.
    """
    asks_for_nccl = _named(cross_device_ops) == "nccl"
    inside = between_devices(devices, "auto" if asks_for_nccl else cross_device_ops)
    told = workers.exchange((len(devices), asks_for_nccl))
    counts = [count for count, _ in told]
    asking = [worker for worker, (_, asks) in enumerate(told) if asks]
    if 0 < len(asking) < len(told):
        others = [worker for worker in range(len(told)) if worker not in asking]
        raise AlgorithmError(
            f"cross_device_ops='nccl' connects the GPUs of all workers: workers {asking} ask for "
            f"it, and workers {others} do not; give all of them the same"
        )
    main = between_replicas(inside, workers, counts)
    background = between_replicas(inside, workers.beside(), counts)
    if asks_for_nccl:
        from dvkernels.communicators.nccl import communicator as nccl

        main = nccl.Nccl(devices, workers=workers, rest=main)
        # NCCL wants one order of calls on all workers, and a second thread has its own.
        background = main if workers.size == 1 else background
    return counts, _packing(main, bytes_per_bucket), _packing(background, bytes_per_bucket)


def between_replicas(
    inside: Communicator,
    workers: Workers,
    replicas_of_workers: Sequence[int],
    bytes_per_bucket: int | None = None,
) -> Communicator:
    """Return the communicator of all replicas of all workers.

    ``inside`` is that of the replicas of this worker. It packs many arrays where
    ``bytes_per_bucket`` is given.
    """
    communicator = inside
    if workers.size > 1:
        communicator = Hierarchical(inside, workers, replicas_of_workers)
    return _packing(communicator, bytes_per_bucket)


def _packing(communicator: Communicator, bytes_per_bucket: int | None) -> Communicator:
    return communicator if bytes_per_bucket is None else Bucketing(communicator, bytes_per_bucket)


def between_devices(devices: Sequence[Device], cross_device_ops: object) -> Communicator:
    """Return the communicator of the replicas of this process, one on each device.

    ``cross_device_ops`` is the name of an algorithm of our own, or an object of the
    :class:`Communicator` protocol.
    """
    num_replicas, name = len(devices), _named(cross_device_ops)
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


def _named(cross_device_ops: object) -> str:
    """Return the name that was given, or "" for an object."""
    return cross_device_ops.lower() if isinstance(cross_device_ops, str) else ""
