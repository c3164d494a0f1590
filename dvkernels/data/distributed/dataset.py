"""Distributed dataset: each global batch is split into one part per replica."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from dvkernels import html_table
from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.communicators.workers.atomic_commit import Exchange
from dvkernels.data.checks import check_count
from dvkernels.data.dataset import Dataset, known_length
from dvkernels.data.distributed import sharding
from dvkernels.data.distributed.balancer import Balancer
from dvkernels.data.distributed.epoch_reader import Distribution
from dvkernels.data.distributed.iterator import DistributedIterator
from dvkernels.data.distributed.options import AutoShardPolicy, InputOptions
from dvkernels.data.distributed.padding import Padder
from dvkernels.data.distributed.sharding import Sharding
from dvkernels.data.distributed.split import Splitter
from dvkernels.data.distributed.to_device import copier_to
from dvkernels.devices.device import Device
from dvkernels.errors import DatasetError
from dvkernels.profiler.debugging import LOGGER
from dvkernels.replicas.work_meter import WorkMeter
from dvkernels.values.distributed import PerReplica
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound

__all__ = ["DistributedDataset"]


_DEFAULT_OPTIONS = InputOptions()


def _allow_any_context(member: str) -> None:
    """Allow every context."""


def _exchange_alone(message: Any) -> list[Any]:
    """Exchange a message in a group of one worker."""
    return [message]


class EpochCount:
    """Counter of the epochs of one dataset: the number of the next one."""

    __slots__ = ("next",)

    def __init__(self) -> None:
        self.next = 0


class EpochCounts:
    """Epoch counters of datasets, or of functions that make datasets, held by weak references."""

    def __init__(self) -> None:
        self._counts: weakref.WeakKeyDictionary[Any, dict[str, EpochCount]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, made: Any) -> EpochCount:
        """Return the counter of a dataset or function; a new one if it cannot be weakly referenced.

        Bound methods of one object count by name.
        """
        # A bound method is a new object at each look-up; the object that it is bound to is not.
        holder, name = getattr(made, "__self__", made), getattr(made, "__name__", "")
        try:
            return self._counts.setdefault(holder, {}).setdefault(name, EpochCount())
        except TypeError:
            return EpochCount()


class DistributedDataset(ProcessBound):
    """Dataset of global batches, each of which is split over all replicas.

    Each ``iter()`` begins the next epoch. The first epoch is that of ``dataset.with_epoch``, else
    0, or, where a strategy has distributed the same dataset before, the epoch after the last one
    begun. Made by ``strategy.distribute_dataset``.

    Parameters
    ----------
    dataset : Dataset
        Its elements are the global batches.
    num_replicas : int
        The number of replicas of this worker. A batch is split over the replicas of all workers
        as evenly as possible, larger parts first; a replica may get an empty part.
    devices : iterable of Device or str, optional
        The devices of these replicas, one each.
    check_context : callable, optional
        Called with the name of a member before it delivers; raises where that is not allowed.
    owner : Placement, optional
        Passed to every ``PerReplica``.
    options : InputOptions
        How batches are sharded and fetched.
    is_dealt : bool
        The elements are batches of single replicas, assigned to them in turn, not global batches.
    share : WorkerShare, optional
        Which replicas of all workers are local; all of them if not given.
    exchange : callable, optional
        All-gather of a small object, in the order of the workers; every worker calls it.
    count : EpochCount, optional
        Counter that continues the epochs where the same dataset is distributed again.
    measure_work : callable, optional
        Begins to measure the work of the local replicas, and returns the meter. Called under
        ``balance="measured"``; the split stays even if not given.

    Notes
    -----
    ``options.auto_shard_policy`` sets how several workers share a dataset:

    ``"data"``
        Each worker takes its rows of each global batch. The order is that of a single worker.
        Rows of other workers are not computed where the batched elements have random access; a
        sequential source is read in full by every worker.
    ``"file"``
        Each worker reads files of its own: every n-th of ``from_files``. Each element is still
        delivered exactly once, in the order of its file, but the composition of the batches
        depends on the number of workers. Needs ``batch(size)`` as the last transform except
        ``map``, no others than ``map``, ``filter`` and ``shuffle(window=...)`` before it, and at
        least as many files as workers. With ``drop_remainder=True`` all workers stop when the
        first worker's files are used up, and the remaining elements of the others are not
        delivered.
    ``"auto"``
        By files where that is possible, files are sequential and no remainder is dropped; else
        by rows, as ``"data"``.
    ``"off"``
        Each worker reads everything, in batches of its share of the global batch, so each element
        is delivered once per worker. For sources that differ between workers, such as live ones.

    Examples
    --------
    >>> from dvkernels.data.dataset import Dataset
    >>> distributed = DistributedDataset(Dataset.range(5).batch(3), num_replicas=2)
    >>> for batch in distributed:
    ...     print(batch)
    PerReplica(0: array([0, 1]), 1: array([2]))
    PerReplica(0: array([3]), 1: array([4]))
    """

    _bound_by = (
        "it feeds the replicas of one strategy of this process; pass on the dv.Dataset, and "
        "distribute that where it is needed"
    )

    def __init__(
        self,
        dataset: Dataset,
        num_replicas: int,
        devices: Iterable[Device | str] | None = None,
        *,
        check_context: Callable[[str], object] = _allow_any_context,
        owner: Placement | None = None,
        options: InputOptions = _DEFAULT_OPTIONS,
        is_dealt: bool = False,
        share: WorkerShare | None = None,
        exchange: Exchange = _exchange_alone,
        count: EpochCount | None = None,
        measure_work: Callable[[], WorkMeter] | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise DatasetError(
                f"distribute_dataset: expected a dv.Dataset; got a {type(dataset).__name__}; "
                "make one with dv.Dataset.from_arrays, from_sequence or from_iterable"
            )
        num_local = check_count("distribute_dataset", "num_replicas", num_replicas, 1)
        share = share or WorkerShare([num_local])
        if share.num_local != num_local:
            raise DatasetError(
                f"distribute_dataset: expected a share of {num_local} local replicas; got {share}"
            )
        self._dataset = dataset
        # PerReplica parses the devices, and checks that there is one for each replica.
        replica_devices = PerReplica((None,) * num_local, devices=devices, owner=owner).devices
        copier = copier_to(replica_devices) if options.prefetch_to_device else None
        padder = None
        if options.pad:
            padder = Padder(
                0 if share.num_workers == 1 else sharding.longest_part(dataset.node, share)
            )
        balancer = None
        if options.balance == "measured":
            if is_dealt:
                raise DatasetError(
                    "distribute_datasets_from_function: expected balance='none', since the batches "
                    "of the replicas come from the function, undivided; got 'measured'; use "
                    "distribute_dataset, which divides global batches"
                )
            balancer = Balancer(WorkMeter(num_local) if measure_work is None else measure_work())
        self._distribution = Distribution(
            dataset.node,
            _sharding(dataset, share, options, is_dealt),
            share,
            Splitter(num_local, replica_devices, owner, is_dealt, copier, balancer, padder),
            options,
            is_dealt,
            exchange,
        )
        self._check_context = check_context
        self._count = count or EpochCount()
        self._next_epoch = self._count.next if dataset.epoch is None else dataset.epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next ``iter()``; later ones continue from it."""
        self._next_epoch = check_count("set_epoch", "epoch", epoch, 0)

    def __iter__(self) -> DistributedIterator:
        epoch = self._next_epoch
        iterator = self._iterator(epoch)
        self._set_latest_epoch(epoch)  # only once the iterator has been made
        return iterator

    @property
    def element_spec(self) -> Any:
        """Shapes and dtypes of an element: see :attr:`DistributedIterator.element_spec`."""
        return self._iterator(self._next_epoch).element_spec

    def _iterator(self, epoch: int) -> DistributedIterator:
        return DistributedIterator(
            self._distribution, epoch, self._check_context, self._set_latest_epoch
        )

    def __len__(self) -> int:
        if self._distribution.sharding.needs_agreement:  # the last worker's end decides
            return known_length(None)
        length = known_length(self._distribution.sharding.node.length)
        if self._distribution.is_dealt:
            return -(-length // self._distribution.share.num_local)
        return length

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        num_replicas = self._distribution.share.num_replicas
        return f"DistributedDataset({self._dataset!r}, num_replicas={num_replicas})"

    _repr_html_ = html_table.of_attributes(
        pipeline="_dataset.node.pipeline", replicas="_distribution.share.num_replicas"
    )

    def _set_latest_epoch(self, epoch: int) -> None:
        self._next_epoch = self._count.next = epoch + 1


def _sharding(
    dataset: Dataset, share: WorkerShare, options: InputOptions, is_dealt: bool
) -> Sharding:
    if is_dealt:
        reason = "each worker has a dataset of its own"
        found = Sharding(AutoShardPolicy.OFF, dataset.node, share.num_workers > 1, reason)
    else:
        policy = AutoShardPolicy.of(options.auto_shard_policy)
        found = sharding.shard(dataset.node, share, policy)
    if share.num_workers > 1:
        LOGGER.info("%r over %d workers: %s, since %s", dataset, share.num_workers,
                    found.policy.name, found.reason)  # fmt: skip
    return found
