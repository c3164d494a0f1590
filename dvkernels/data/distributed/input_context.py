"""Input context: a worker's rank and the sizes, for functions that make a dataset per worker."""

from __future__ import annotations

from dataclasses import dataclass

from dvkernels.data.checks import check_count

__all__ = ["InputContext"]


@dataclass(frozen=True)
class InputContext:
    """Index of one input pipeline among all, as ``distribute_datasets_from_function`` passes it.

    Attributes
    ----------
    num_input_pipelines : int
        The number of datasets, one per worker.
    input_pipeline_id : int
        The index of this dataset, from 0.
    num_replicas_in_sync : int
        The number of replicas of all workers.
    epoch : int
        The first epoch that the dataset is made for. It continues where a loop passes the same
        function to ``distribute_datasets_from_function`` for each epoch.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.InputContext(1, 0, 4).get_per_replica_batch_size(32)
    8
    """

    num_input_pipelines: int = 1
    input_pipeline_id: int = 0
    num_replicas_in_sync: int = 1
    epoch: int = 0

    def __post_init__(self) -> None:
        check_count("InputContext", "num_input_pipelines", self.num_input_pipelines, 1)
        check_count("InputContext", "num_replicas_in_sync", self.num_replicas_in_sync, 1)
        check_count("InputContext", "epoch", self.epoch, 0)
        last = self.num_input_pipelines - 1
        check_count("InputContext", "input_pipeline_id", self.input_pipeline_id, 0, maximum=last)

    def get_per_replica_batch_size(self, global_batch_size: int) -> int:
        """Return the batch size of one replica; ``ValueError`` if the global size does not divide.

        Parameters
        ----------
        global_batch_size : int
            The number of rows of a global batch.
        """
        size = check_count("get_per_replica_batch_size", "global_batch_size", global_batch_size, 0)
        if size % self.num_replicas_in_sync:
            raise ValueError(
                f"a global batch of {size} does not divide over {self.num_replicas_in_sync} "
                f"replicas; choose a multiple, or use distribute_dataset, which splits any batch"
            )
        return size // self.num_replicas_in_sync
