"""Point-to-point messages by MPI; implements ``point_to_point.PointToPoint``."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from mpi4py import MPI

from dvkernels.devices.array_spec import HostArray

__all__: list[str] = []


@final
class MpiPointToPoint:
    """Point-to-point messages of flat arrays over one MPI communicator, used by this object only.

    All workers construct theirs together.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self._has_persistent = _has_working_persistent_collectives(comm)

    def send(self, array: HostArray, to: int, tag: int) -> MPI.Request:
        """Send an array to a worker."""
        return self._comm.Isend([array.view(np.uint8), MPI.BYTE], to, tag)

    def receive(self, array: HostArray, source: int, tag: int) -> MPI.Request:
        """Receive an array from a worker."""
        return self._comm.Irecv([array.view(np.uint8), MPI.BYTE], source, tag)

    def all_gather(self, own: HostArray, gathered: HostArray) -> Any:
        """Return a repeatable all-gather, persistent (MPI 4) where that works."""
        buffers = [own, MPI.BYTE], [gathered, MPI.BYTE]
        return (
            self._comm.Allgather_init(*buffers)
            if self._has_persistent
            else _RepeatedAllGather(self._comm, buffers)
        )

    def progress(self) -> None:
        """Progress MPI, which moves data only inside of its calls."""
        self._comm.Iprobe()


class _RepeatedAllGather:
    """Repeatable all-gather that starts a new MPI_Iallgather each time."""

    def __init__(self, comm: MPI.Comm, buffers: Any) -> None:
        self._comm, self._buffers = comm, buffers
        self._request = MPI.REQUEST_NULL

    def Start(self) -> None:
        """Start the all-gather."""
        self._request = self._comm.Iallgather(*self._buffers)

    def Test(self) -> bool:
        """Return whether the all-gather is complete."""
        return bool(self._request.Test())

    def Free(self) -> None:
        """Do nothing: no MPI object is kept between two starts."""


def _has_working_persistent_collectives(comm: MPI.Comm) -> bool:
    """Return whether MPI's persistent all-gather works, on all workers.

    From the second start on, that of Intel MPI 2021.18 delivers the data of the first, even between
    two processes of one host.
    """
    own, gathered = np.zeros(1, np.int64), np.zeros(comm.size, np.int64)
    request = comm.Allgather_init(own, gathered)
    found = []
    for own[0] in (1, 2):
        request.Start()
        request.Wait()
        found.append(bool((gathered == own[0]).all()))
    request.Free()
    return bool(comm.allreduce(all(found), MPI.LAND))
