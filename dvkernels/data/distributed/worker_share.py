"""Worker share: the replicas of one worker, and its rows of a global batch."""

from __future__ import annotations

from collections.abc import Sequence

from dvkernels.data.checks import check_count
from dvkernels.errors import DatasetError
from dvkernels.schedules import partition

__all__: list[str] = []


class WorkerShare:
    """The replicas of one worker among those of all workers.

    Parameters
    ----------
    replicas_of_workers : sequence of int
        The number of replicas of each worker. Global replica ids continue from worker to worker.
    worker : int
        The rank of this worker.

    Examples
    --------
    >>> share = WorkerShare([2, 2], worker=1)
    >>> share.num_replicas, share.first_replica
    (4, 2)
    >>> share.rows(10)  # the parts of the replicas have 3, 3, 2 and 2 rows
    (6, 10)
    """

    __slots__ = ("_counts", "first_replica", "num_local", "num_replicas", "num_workers", "worker")

    def __init__(self, replicas_of_workers: Sequence[int], worker: int = 0) -> None:
        counts = [check_count("WorkerShare", "replicas", count, 1) for count in replicas_of_workers]
        self._counts = tuple(counts)
        self.num_workers = len(counts)
        self.worker = check_count("WorkerShare", "worker", worker, 0)
        if self.worker >= self.num_workers:
            raise DatasetError(
                f"WorkerShare: expected a worker from 0 to {self.num_workers - 1}; got "
                f"{self.worker}"
            )
        starts = partition.starts(counts)
        self.num_replicas = starts[-1]
        self.num_local = counts[self.worker]
        self.first_replica = starts[self.worker]

    def rows(self, length: int) -> tuple[int, int]:
        """Return the range (start, stop) of this worker's rows of a global batch of ``length``.

        Split evenly over the local replicas, larger parts first, these rows give the same parts as
        the whole batch split over all replicas.
        """
        start, _ = partition.bounds(length, self.num_replicas, self.first_replica)
        last = self.first_replica + self.num_local - 1
        return start, partition.bounds(length, self.num_replicas, last)[1]

    def num_rows(self, length: int) -> list[int]:
        """Return the number of rows of a global batch for each worker."""
        shares = [WorkerShare(self._counts, worker) for worker in range(self.num_workers)]
        return [stop - start for start, stop in (share.rows(length) for share in shares)]

    def __repr__(self) -> str:
        last = self.first_replica + self.num_local - 1
        return (
            f"WorkerShare(replicas {self.first_replica} to {last} of {self.num_replicas}, "
            f"worker {self.worker} of {self.num_workers})"
        )
