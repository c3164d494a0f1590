"""Bytes between workers by MPI: see ``traffic.py``."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from mpi4py import MPI

__all__: list[str] = []


@final
class MpiTraffic:
    """Carries flat arrays by the messages of one communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Of the workers, for the use of this alone.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size

    def send(self, array: Any, to: int, tag: int) -> Any:
        """Send an array to a worker."""
        return self._comm.Isend([array.view(np.uint8), MPI.BYTE], to, tag)

    def receive(self, array: Any, source: int, tag: int) -> Any:
        """Receive what a worker sends."""
        return self._comm.Irecv([array.view(np.uint8), MPI.BYTE], source, tag)

    def gather(self, own: Any, held: Any) -> Any:
        """Return a gather that MPI has set up."""
        return self._comm.Allgather_init([own, MPI.BYTE], [held, MPI.BYTE])

    def move(self) -> None:
        """Ask MPI something: it moves data only while it is asked."""
        self._comm.Iprobe()
