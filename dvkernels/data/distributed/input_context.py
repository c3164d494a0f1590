"""What a function that makes a worker's dataset may know of its place among the workers."""

from __future__ import annotations

from dataclasses import dataclass

from dvkernels.data.checks import check_count

__all__ = ["InputContext"]


@dataclass(frozen=True)
class InputContext:
    """The place of one input pipeline; handed to ``distribute_datasets_from_function``'s function.

    Attributes
    ----------
    num_input_pipelines : int
        How many datasets are made, one a worker.
    input_pipeline_id : int
        Which of them this one is, from 0.
    num_replicas_in_sync : int
        The replicas of all workers.
    epoch : int
        The first epoch that the dataset is made for. It counts on where a loop hands the same
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
        """Return the share of one replica in a global batch; ValueError if it does not divide."""
        size = check_count("get_per_replica_batch_size", "global_batch_size", global_batch_size, 0)
        if size % self.num_replicas_in_sync:
            raise ValueError(
                f"a global batch of {size} does not divide over {self.num_replicas_in_sync} "
                f"replicas; choose a multiple, or use distribute_dataset, which splits any batch"
            )
        return size // self.num_replicas_in_sync
