"""Dataset distribution: the methods of a strategy that distribute a dataset over its replicas."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dvkernels import context
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset, EpochCount, EpochCounts
from dvkernels.data.distributed.input_context import InputContext
from dvkernels.data.distributed.options import InputOptions
from dvkernels.errors import DatasetError
from dvkernels.replicas.runner import Runner
from dvkernels.replicas.streams import StreamedRunner
from dvkernels.values import function_checks
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound

__all__: list[str] = []

# The verb that error messages name when workers disagree about an input step.
_READ = "next(iterator) of a distributed dataset"


class DatasetDistribution(ProcessBound):
    """Base class of strategies: their methods that distribute datasets."""

    _placement: Placement
    _epochs: EpochCounts
    _runner: Runner | StreamedRunner

    def distribute_dataset(
        self, dataset: Dataset, options: InputOptions | None = None
    ) -> DistributedDataset:
        """Distribute a dataset: split each batch over the replicas as evenly as possible.

        Parameters
        ----------
        dataset : Dataset
            Its ``batch(size)`` is the global batch.
        options : InputOptions, optional
            Prefetching, sharding, the policy for elements that fail, and the balance.

        Returns
        -------
        DistributedDataset
            Its iterators yield a ``PerReplica``, or a pytree of them. The parts of a batch differ
            in size by at most one element, larger parts first, unless
            ``InputOptions(balance="measured")`` lets them follow the speed of the replicas.

        Raises
        ------
        DatasetError
            Not a ``Dataset``, or options of another type.
        ContextError
            Called in replica context or under another strategy's scope.

        Notes
        -----
        Each ``iter()`` is the next epoch and is shuffled anew, also where a loop distributes the
        same ``Dataset`` once per epoch. ``dataset.with_epoch(k)`` chooses the epoch.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     for batch in strategy.distribute_dataset(dv.Dataset.range(5).batch(3)):
        ...         print(batch)
        PerReplica(0: array([0, 1]), 1: array([2]))
        PerReplica(0: array([3]), 1: array([4]))
        """
        context.require_cross_replica(self._placement, "distribute_dataset")
        count = self._epochs.of(dataset)
        return self._distributed("distribute_dataset", dataset, options, count, is_dealt=False)

    def distribute_datasets_from_function(
        self, fn: Callable[[InputContext], Dataset], options: InputOptions | None = None
    ) -> DistributedDataset:
        """Distribute a dataset of per-replica batches that ``fn`` makes.

        Parameters
        ----------
        fn : callable
            Called as ``fn(context)`` with an ``InputContext``; returns a dataset, which is neither
            split nor sharded: its elements, batched or not, go to the replicas in turn. Called
            once per worker, for the replicas of that worker. ``context.epoch`` is the epoch of
            the first ``iter()``; it advances when the same function is passed again.
        options : InputOptions, optional
            Prefetching, and the policy for elements that fail.

        Returns
        -------
        DistributedDataset
            If the last step has too few batches, the remaining replicas get empty ones. Unbatched
            elements that do not fill a step raise ``DatasetError`` there.

        Raises
        ------
        DatasetError
            ``fn`` did not return a ``Dataset``, or options of another type.
        ContextError
            Called in replica context or under another strategy's scope.

        Examples
        --------
        >>> import dvkernels as dv
        >>> def make(context):
        ...     return dv.Dataset.range(7).batch(context.get_per_replica_batch_size(4))
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     for batch in strategy.distribute_datasets_from_function(make):
        ...         print(batch)
        PerReplica(0: array([0, 1]), 1: array([2, 3]))
        PerReplica(0: array([4, 5]), 1: array([6]))
        """
        verb = "distribute_datasets_from_function"
        context.require_cross_replica(self._placement, verb)
        function_checks.check(verb, fn)
        workers = self._placement.workers
        count = self._epochs.of(fn)
        num_replicas = self._placement.num_replicas
        made = fn(InputContext(workers.size, workers.rank, num_replicas, count.next))
        return self._distributed(verb, made, options, count, is_dealt=True)

    def _distributed(
        self,
        verb: str,
        dataset: Any,
        options: InputOptions | None,
        count: EpochCount,
        *,
        is_dealt: bool,
    ) -> DistributedDataset:
        if not isinstance(dataset, Dataset):
            raise DatasetError(
                f"{verb} expected a dvkernels.Dataset, got a {type(dataset).__name__}; "
                f"make one with Dataset.from_arrays, from_sequence or from_iterable"
            )
        if options is not None and not isinstance(options, InputOptions):
            raise DatasetError(
                f"{verb}: expected options to be a dv.InputOptions, got a {type(options).__name__}"
            )
        placement = self._placement
        return DistributedDataset(
            dataset,
            placement.num_local,
            placement.replica_devices,
            check_context=functools.partial(context.require_cross_replica, placement),
            owner=placement,
            options=options or InputOptions(),
            is_dealt=is_dealt,
            share=placement.share,
            exchange=functools.partial(placement.workers.exchange, verb=_READ),
            count=count,
            measure_work=self._runner.measure_work,
        )
