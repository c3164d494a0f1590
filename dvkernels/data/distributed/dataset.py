"""A dataset whose batches are cut into one part per replica."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dvkernels.data.checks import check_count
from dvkernels.data.dataset import Dataset, known_length
from dvkernels.data.distributed import sharding
from dvkernels.data.distributed.iterator import DistributedIterator
from dvkernels.data.distributed.lockstep import Exchange
from dvkernels.data.distributed.options import AutoShardPolicy, InputOptions
from dvkernels.data.distributed.sharding import Sharding
from dvkernels.data.distributed.split import Splitter
from dvkernels.data.distributed.to_device import DeviceCopier
from dvkernels.data.distributed.worker_share import WorkerShare
from dvkernels.data.epoch_count import EpochCount
from dvkernels.errors import DatasetError
from dvkernels.profiler.debugging import LOGGER
from dvkernels.values.distributed import PerReplica
from dvkernels.values.process_bound import ProcessBound

__all__ = ["DistributedDataset"]


_PLAIN = InputOptions()


def _allow(member: str) -> None:
    """Check nothing: every context will do."""


def _alone(word: Any) -> list[Any]:
    """Exchange a word among one worker."""
    return [word]


class DistributedDataset(ProcessBound):
    """A dataset of global batches, each of which all replicas share.

    Each ``iter()`` is the next epoch: from that of ``dataset.with_epoch`` on, else from 0 or, where
    a strategy has distributed this very dataset before, from the one behind those begun then. It
    is made by ``strategy.distribute_dataset``.

    Parameters
    ----------
    dataset : Dataset
        Its elements are the global batches.
    num_replicas : int
        How many parts a batch is cut into, as evenly as it goes, larger ones first; a replica
        may get an empty part. Over several workers, the replicas of this one.
    devices : iterable of Device or str, optional
        Where these replicas live, one each.
    check_context : callable, optional
        Called with the name of the member before anything is delivered; raises where that is
        not allowed.
    owner : object, optional
        Handed on to every ``PerReplica``.
    options : InputOptions
        How batches are fetched.
    is_dealt : bool
        The elements are the replicas' batches, dealt to them in turn, not global batches.
    share : WorkerShare, optional
        Which replicas of all workers these are; all of them if not given.
    exchange : callable, optional
        Given a small object, returns those of all workers in their order; every worker calls it.
    count : EpochCount, optional
        Which epoch comes next where the same dataset is distributed again.

    Notes
    -----
    How several workers share a dataset, ``options.auto_shard_policy`` says:

    ``"data"``
        Each worker takes its rows of each global batch. The order is that of one worker. Rows of
        others are not computed where the batched elements have random access; a sequential
        source is gone through by every worker.
    ``"file"``
        Each worker reads files of its own: every n-th of ``from_files``. Each element still
        comes exactly once, in the order of its file, but which elements meet in a batch depends
        on the number of workers. Needs ``batch(size)`` as the last step but ``map``, nothing but
        ``map``, ``filter`` and ``shuffle(window=...)`` before it, and at least as many files as
        workers. With ``drop_remainder=True`` all stop when the first worker's files are used up,
        and what the others have left is not delivered.
    ``"auto"``
        By files where that can be done, files are sequential, and no remainder is left out; else
        by elements.
    ``"off"``
        Each worker reads everything, in batches of its share of the global batch: each element
        comes once a worker. For sources that differ between workers, such as live ones.

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
        devices: Iterable[Any] | None = None,
        *,
        check_context: Callable[[str], None] = _allow,
        owner: object = None,
        options: InputOptions = _PLAIN,
        is_dealt: bool = False,
        share: WorkerShare | None = None,
        exchange: Exchange = _alone,
        count: EpochCount | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise DatasetError(
                f"distribute_dataset: expected a dv.Dataset; got a {type(dataset).__name__}; "
                "make one with dv.Dataset.from_arrays, from_sequence or from_iterable"
            )
        num_local = check_count("distribute_dataset", "num_replicas", num_replicas, 1)
        self._share = share or WorkerShare([num_local])
        if self._share.num_local != num_local:
            raise DatasetError(
                f"distribute_dataset: expected a share of {num_local} local replicas; got "
                f"{self._share}"
            )
        self._dataset = dataset
        self._is_dealt = is_dealt
        self._sharding = self._shard(options)
        # The devices as PerReplica reads them: parsed once, and as many as there are replicas.
        held = PerReplica((None,) * num_local, devices=devices).devices
        is_carried = options.prefetch_to_device and held[0].kind == "cuda"
        conveyor = DeviceCopier(held) if is_carried else None
        self._dealer = Splitter(num_local, held, owner, is_dealt, conveyor)
        self._check_context = check_context
        self._options = options
        self._exchange = exchange
        self._count = count or EpochCount()
        self._next_epoch = self._count.next if dataset.epoch is None else dataset.epoch

    def _shard(self, options: InputOptions) -> Sharding:
        node, share = self._dataset.node, self._share
        if self._is_dealt:
            why = "each worker has a dataset of its own"
            shared = Sharding(AutoShardPolicy.OFF, node, share.num_workers > 1, why)
        else:
            shared = sharding.shard(node, share, AutoShardPolicy.of(options.auto_shard_policy))
        if share.num_workers > 1:
            LOGGER.info("%r over %d workers: %s, since %s", self._dataset, share.num_workers,
                        shared.policy.name, shared.why)  # fmt: skip
        return shared

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next ``iter()``; those after it count on from there."""
        self._next_epoch = check_count("set_epoch", "epoch", epoch, 0)

    def __iter__(self) -> DistributedIterator:
        epoch = self._next_epoch
        iterator = self._iterator(epoch)
        self._follow(epoch)  # now that nothing can keep this one from being used
        return iterator

    @property
    def element_spec(self) -> Any:
        """What each element holds: see :attr:`DistributedIterator.element_spec`."""
        return self._iterator(self._next_epoch).element_spec

    def _iterator(self, epoch: int) -> DistributedIterator:
        return DistributedIterator(
            self._dataset.node,
            self._sharding,
            self._share,
            self._dealer,
            epoch=epoch,
            check_context=self._check_context,
            on_load=self._follow,
            options=self._options,
            is_dealt=self._is_dealt,
            exchange=self._exchange,
        )

    def __len__(self) -> int:
        if self._sharding.needs_agreement:  # only the end of the last worker tells
            return known_length(None)
        length = known_length(self._sharding.node.length)
        return -(-length // self._share.num_local) if self._is_dealt else length

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"DistributedDataset({self._dataset!r}, num_replicas={self._share.num_replicas})"

    def _follow(self, epoch: int) -> None:
        self._next_epoch = self._count.next = epoch + 1
