"""Distribution of commands to the ranks of an MPI job."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

__all__ = ["each"]

_TAG = 1
_NAP_SECONDS = 0.005


def each(comm: Any, source: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield on every rank the commands that rank 0 reads.

    Ranks sleep while they wait for the next command: MPI's own waits keep a core busy.
    """
    while (command := _next(comm, source)) is not None:
        yield command


def _next(comm: Any, source: Iterator[dict[str, Any]]) -> Any:
    if comm.rank == 0:
        command = next(source, None)
        for other in range(1, comm.size):
            comm.send(command, dest=other, tag=_TAG)
        return command
    while not comm.Iprobe(source=0, tag=_TAG):
        time.sleep(_NAP_SECONDS)
    return comm.recv(source=0, tag=_TAG)
