"""Multi-worker mirrored strategy: replicas in several processes, variables mirrored on all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.cluster.resolvers import default_resolver
from dvkernels.communicators import registry as communicators
from dvkernels.communicators.base import Communicator
from dvkernels.devices.device import Device
from dvkernels.strategies.base import Strategy
from dvkernels.strategies.strategy_options import check_options
from dvkernels.user_errors import brief

__all__ = ["MultiWorkerMirroredStrategy"]

# Large enough that the many small gradients of a step take few rounds, small enough that the first
# bucket is complete, and can be reduced, before the last gradient is.
_BYTES_PER_BUCKET = 4 * 1024 * 1024


@final
class MultiWorkerMirroredStrategy(Strategy):
    """One replica per local device on every worker, variables mirrored on all of them.

    Every process started by ``mpiexec`` or ``srun`` runs the same program and creates this strategy
    at the same point of it. Processes of one host that something else has started pass a
    :class:`dvkernels.cluster.HostGroup`. A single process is a job of one worker.

    Parameters
    ----------
    cluster_resolver : ClusterResolver, optional
        Says which worker this process is. If not given, detected from the launcher's environment
        variables, see :func:`dvkernels.cluster.default_resolver`.
    devices : sequence of Device or str, or int, optional
        The devices of this process, one replica each; a number means so many CPU replicas. If not
        given, one replica per core of this process's share.
    cross_device_ops : str or Communicator
        The algorithm between the replicas of this process, as for :class:`MirroredStrategy`, and
        between hosts: ``"direct"`` exchanges parts pairwise, ``"ring"`` passes them around a ring,
        and for all others the cost model chooses by size. ``"nccl"`` connects the GPUs of all
        workers, one per replica. All workers must pass the same of these three names, or none of
        them.
    timeout_seconds : float
        How long a worker, or a replica of this process, waits for the others in a collective [s].
        Between replicas, the default gives way to the environment variable
        ``DVKERNELS_TIMEOUT_SECONDS``.
    bytes_per_bucket : int, optional
        Size of the buckets into which ``all_reduce`` packs the arrays of a pytree [bytes]. If not
        given, 4 MiB; a single worker does not pack.
    seed : int
        Seed of ``ctx.rng``, from 0 to 2**1024 - 1.
    threads : str
        ``"share"`` or ``"all"``: the threads of BLAS, OpenMP and Numba in each replica of
        this process, as for :class:`Strategy`; the cores are this process's share of those of
        the host.

    Raises
    ------
    ClusterError
        The launcher's environment variables are malformed, MPI started another number of
        processes, mpi4py is missing, or a host group does not fit together.
    DeviceError, AlgorithmError
        As for ``MirroredStrategy``. If ``"nccl"`` fails on one worker (NCCL is missing, two
        replicas share a GPU, some workers passed another name), all workers raise; likewise if
        they passed different algorithms between hosts.
    CollectiveTimeoutError
        Another worker did not create its strategy in time, or NCCL did not connect the workers.
    TypeError
        ``cluster_resolver`` is not a ``dv.cluster.ClusterResolver``, or ``seed`` not an integer.
    ValueError
        ``timeout_seconds`` or ``bytes_per_bucket`` is not a positive number, ``seed`` is out of
        range, or ``threads`` is neither ``"share"`` nor ``"all"``.

    Notes
    -----
    Replica ids count over all workers. ``run`` starts the replicas of this process;
    ``local_results``, and ``.values`` and ``len()`` of distributed values, cover these only.
    Collectives, ``reduce``, ``gather``, writes in cross-replica context and reads of ON_READ
    variables communicate, so every worker must make the same calls in the same order. Values given
    in cross-replica context (initial values, ``assign``, ``broadcast_to``) are those of the first
    worker.

    Workers compare the fingerprints of each collective before they carry it out. If they disagree,
    all raise ``CollectiveMismatchError``; if the step of one worker fails, the others raise an
    error with its text at their next collective. After either all workers can go on together. A
    worker that is late (``CollectiveTimeoutError``) or lost (``WorkerLostError``) ends the job:
    every later collective raises the same error, and MPI aborts the remaining processes when the
    first one exits; nobody ends those of a host group.

    Workers of one host exchange data through shared memory, hosts by MPI messages: a reduction is
    hierarchical, first within each host, then between hosts. Values on GPUs are staged through host
    memory, or go from GPU to GPU with ``"nccl"``: NCCL takes contiguous arrays, and the operations
    and dtypes for which it keeps this library's contract; all others are staged, and so is
    ``all_reduce_async``. The workers agree on each NCCL call before they issue it, and a call that
    does not end on the GPU within ``timeout_seconds`` ends the job.

    The environment variable ``DVKERNELS_HOSTS=2,2`` makes four workers of one host behave as if
    they ran on two hosts; ``DVKERNELS_NETWORK`` sets the constants of the cost model between
    hosts, as ``bench --calibrate`` prints them.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.MultiWorkerMirroredStrategy(devices=["cpu:0", "cpu:1"]) as strategy:
    ...     ids = strategy.run(lambda: dv.get_replica_context().replica_id_in_sync_group)
    ...     print(strategy.gather(ids))
    [0 1]
    """

    def __init__(
        self,
        cluster_resolver: ClusterResolver | None = None,
        *,
        devices: Sequence[Device | str] | int | None = None,
        cross_device_ops: str | Communicator = "auto",
        timeout_seconds: float = 600,
        bytes_per_bucket: int | None = None,
        seed: int = 0,
        threads: str = "share",
    ) -> None:
        check_options(
            bytes_per_bucket=bytes_per_bucket,
            seed=seed,
            threads=threads,
            timeout_seconds=timeout_seconds,
        )
        self._resolver = default_resolver() if cluster_resolver is None else cluster_resolver
        if not isinstance(self._resolver, ClusterResolver):
            raise TypeError(
                f"expected cluster_resolver to be a dv.cluster.ClusterResolver, got "
                f"{brief(cluster_resolver)}"
            )
        workers = communicators.between_workers(
            self._resolver, float(timeout_seconds), cross_device_ops
        )
        if bytes_per_bucket is None and workers.size > 1:
            bytes_per_bucket = _BYTES_PER_BUCKET
        try:
            super().__init__(
                devices,
                cross_device_ops,
                bytes_per_bucket=bytes_per_bucket,
                workers=workers,
                seed=seed,
                threads=threads,
                timeout_seconds=timeout_seconds,
            )
        except BaseException:
            workers.close()  # nobody else would
            raise

    @property
    def cluster_resolver(self) -> ClusterResolver:
        """The resolver of this process's position in the cluster."""
        return self._resolver
