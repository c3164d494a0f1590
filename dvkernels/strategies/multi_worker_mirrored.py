"""Several processes, on one host or many, each with some replicas; variables mirrored on all."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, final

from dvkernels.cluster.resolvers import ClusterResolver, default_resolver
from dvkernels.communicators import registry as communicators
from dvkernels.communicators.base import Communicator
from dvkernels.devices.base import Device
from dvkernels.strategies.base import Strategy
from dvkernels.user_errors import shown

__all__ = ["MultiWorkerMirroredStrategy"]

# So that a step's many small gradients meet in few rounds, and a bucket is ready before all are.
_BYTES_PER_BUCKET = 4 * 1024 * 1024


@final
class MultiWorkerMirroredStrategy(Strategy):
    """One replica per local device on every worker, variables mirrored on all of them.

    Started by ``mpiexec`` or ``srun``, every process runs the same program, and makes this strategy
    at the same point of it; one process alone is a job of one worker.

    Parameters
    ----------
    cluster_resolver : ClusterResolver, optional
        Who tells this process its place; found by itself under the usual launchers.
    devices : sequence of Device or str, optional
        Those of this process, one replica each. One per core of its share if not given.
    cross_device_ops : str or Communicator
        How the replicas of this process reduce, see :class:`MirroredStrategy`, and hosts between
        each other: ``"direct"`` exchanges parts, ``"ring"`` sends them around, and otherwise the
        cost model says for each size. ``"nccl"`` connects the GPUs of all workers, of which each
        replica has one. All workers ask for the same of these three, or for none.
    timeout_seconds : float
        How long a worker waits for the others in a collective.
    bytes_per_bucket : int, optional
        Arrays of a nest are packed into buckets of so many bytes. 4 MiB if not given; one worker
        alone does not pack.

    Raises
    ------
    ClusterError
        The launcher's variables are malformed, MPI started another number of processes, or
        mpi4py is missing.
    DeviceError, AlgorithmError
        As of ``MirroredStrategy``. What is wrong with ``"nccl"`` on one worker is raised on all:
        NCCL is missing, two replicas share a GPU, some workers do not ask for it. So are different
        ways between hosts.
    CollectiveTimeoutError
        The other workers do not make theirs in time, or NCCL does not connect them.
    ValueError
        ``timeout_seconds`` or ``bytes_per_bucket`` is not positive.

    Notes
    -----
    Replica ids count over all workers. ``run`` starts the replicas of this process;
    ``local_results``, ``.values`` and ``len()`` of distributed values speak of those. Collectives,
    ``reduce``, ``gather``, writes across replicas and reads of ON_READ variables bring all workers
    together, so every worker must make them, in the same order. A value given across replicas is
    the first worker's: initial values, ``assign``, ``broadcast_to``.

    Each collective is compared before it is carried out. Workers that disagree raise
    ``CollectiveMismatchError``, and where a worker's step fails, the others' raise an error with
    its text at their next collective; after both all are in step again. A worker that is late
    (``CollectiveTimeoutError``) or lost (``WorkerLostError``) ends the job: every later collective
    raises the same, and MPI ends what is left when the first process exits.

    Processes of one host exchange data through memory that they share, hosts by messages of MPI:
    what the workers of a host have is added up there first. Values on GPUs go through the memory of
    the host, or between the GPUs by ``"nccl"``: it carries what is dense and what it does as this
    library promises, the workers agree on each of its calls before they make it, and a call that
    does not end on the GPU within ``timeout_seconds`` ends the job. ``all_reduce_async`` goes
    through the host.

    ``DVKERNELS_HOSTS=2,2`` in the environment lets four workers of one host pretend to be on two,
    and ``DVKERNELS_NETWORK`` tells the cost model what is between hosts, as ``bench --calibrate``
    prints it.

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
        devices: Sequence[Device | str] | None = None,
        cross_device_ops: str | Communicator = "auto",
        timeout_seconds: float = 600,
        bytes_per_bucket: int | None = None,
    ) -> None:
        self._resolver = default_resolver() if cluster_resolver is None else cluster_resolver
        if not isinstance(self._resolver, ClusterResolver):
            raise TypeError(
                f"expected cluster_resolver to be a dv.cluster.ClusterResolver, got "
                f"{shown(cluster_resolver)}"
            )
        workers = communicators.between_workers(
            self._resolver, _checked(timeout_seconds), cross_device_ops
        )
        if bytes_per_bucket is None and workers.size > 1:
            bytes_per_bucket = _BYTES_PER_BUCKET
        super().__init__(
            devices, cross_device_ops, bytes_per_bucket=bytes_per_bucket, workers=workers
        )

    @property
    def cluster_resolver(self) -> ClusterResolver:
        """Who told this process its place among the workers."""
        return self._resolver


def _checked(timeout_seconds: Any) -> float:
    try:
        seconds = float(timeout_seconds)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"timeout_seconds is a positive number of at most {threading.TIMEOUT_MAX:g}, got "
            f"{timeout_seconds!r}"
        )
    return seconds
