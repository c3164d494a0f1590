"""Bytes between workers by MPI: see ``point_to_point.py``."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from mpi4py import MPI

__all__: list[str] = []


@final
class MpiPointToPoint:
    """Carries flat arrays by the messages of one communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Of the workers, for the use of this alone. All of them make theirs together.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self._is_persistent = _is_persistent_right(comm)

    def send(self, array: Any, to: int, tag: int) -> Any:
        """Send an array to a worker."""
        return self._comm.Isend([array.view(np.uint8), MPI.BYTE], to, tag)

    def receive(self, array: Any, source: int, tag: int) -> Any:
        """Receive what a worker sends."""
        return self._comm.Irecv([array.view(np.uint8), MPI.BYTE], source, tag)

    def gather(self, own: Any, held: Any) -> Any:
        """Return a gather that MPI has set up, if it can do so."""
        given = [own, MPI.BYTE], [held, MPI.BYTE]
        return (
            self._comm.Allgather_init(*given) if self._is_persistent else _Anew(self._comm, given)
        )

    def move(self) -> None:
        """Ask MPI something: it moves data only while it is asked."""
        self._comm.Iprobe()


class _Anew:
    """A gather that MPI sets up each time."""

    def __init__(self, comm: Any, given: Any) -> None:
        self._comm, self._given = comm, given
        self._request = MPI.REQUEST_NULL

    def Start(self) -> None:
        """Begin."""
        self._request = self._comm.Iallgather(*self._given)

    def Test(self) -> bool:
        """Tell whether it is done."""
        return bool(self._request.Test())

    def Free(self) -> None:
        """Forget it: nothing is kept between two of them."""


def _is_persistent_right(comm: Any) -> bool:
    """Tell whether MPI's persistent operations bring what they are given, on all workers.

    Those of Intel MPI 2021.18 bring from the second round on what was there in the first, between
    two processes of one host too.
    """
    own, held = np.zeros(1, np.int64), np.zeros(comm.size, np.int64)
    meeting = comm.Allgather_init(own, held)
    found = []
    for own[0] in (1, 2):
        meeting.Start()
        meeting.Wait()
        found.append(bool((held == own[0]).all()))
    meeting.Free()
    return bool(comm.allreduce(all(found), MPI.LAND))
