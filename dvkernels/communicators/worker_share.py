"""Worker share: the replicas of one worker, and its rows of a global batch."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

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

    __slots__ = ("_starts", "first_replica", "num_local", "num_replicas", "num_workers", "worker")

    def __init__(self, replicas_of_workers: Sequence[int], worker: int = 0) -> None:
        self._starts = partition.starts(replicas_of_workers)
        self.worker = worker
        self.num_workers = len(replicas_of_workers)
        self.num_replicas = self._starts[-1]
        self.num_local = replicas_of_workers[worker]
        self.first_replica = self._starts[worker]

    def worker_of(self, replica: int) -> int:
        """Return the worker that runs a replica."""
        return bisect.bisect(self._starts, replica) - 1

    def rows(self, length: int) -> tuple[int, int]:
        """Return the range (start, stop) of this worker's rows of a global batch of ``length``.

        Split evenly over the local replicas, larger parts first, these rows give the same parts as
        the whole batch split over all replicas.
        """
        return self._rows_of(self.worker, length)

    def num_rows(self, length: int) -> list[int]:
        """Return the number of rows of a global batch for each worker."""
        ranges = (self._rows_of(worker, length) for worker in range(self.num_workers))
        return [stop - start for start, stop in ranges]

    def _rows_of(self, worker: int, length: int) -> tuple[int, int]:
        first, after = self._starts[worker], self._starts[worker + 1]
        start, _ = partition.bounds(length, self.num_replicas, first)
        return start, partition.bounds(length, self.num_replicas, after - 1)[1]

    def __repr__(self) -> str:
        last = self.first_replica + self.num_local - 1
        return (
            f"WorkerShare(replicas {self.first_replica} to {last} of {self.num_replicas}, "
            f"worker {self.worker} of {self.num_workers})"
        )
