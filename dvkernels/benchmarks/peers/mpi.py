"""``MPI_Allreduce``: MPICH, Open MPI, Intel MPI. Every rank runs this file."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Any

import numpy as np

from dvkernels.benchmarks import inputs
from dvkernels.benchmarks.peers import protocol

__all__: list[str] = []

_NAP_SECONDS = 0.005


class _AllReduce:
    variants: tuple[str, ...] = ("in place", "out of place")

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._comm = mpi.COMM_WORLD
        self._seed = 0

    def prepare(self, count: int, dtype: np.dtype[Any], seed: int) -> None:
        self._own = self._out = np.empty(0)  # gives back what was there
        self._seed = seed
        self._own = np.empty(count, dtype)
        self._out = np.empty(count, dtype)
        inputs.fill(self._own, "sum", seed, self._comm.rank)

    def _call(self, variant: str) -> None:
        source = self._mpi.IN_PLACE if variant == "in place" else self._own
        self._comm.Allreduce(source, self._out, self._mpi.SUM)

    def call_once(self, variant: str) -> list[np.ndarray[Any, Any]]:
        self._out[:] = self._own if variant == "in place" else np.nan
        self._call(variant)
        return [self._out]

    def seconds(self, variant: str, num_calls: int) -> float:
        if variant == "in place":
            self._out[:] = self._own
        self._call(variant)
        self._comm.Barrier()
        return protocol.repeat(lambda: self._call(variant), num_calls, time.perf_counter)


class _Ranks:
    """The other ranks. They look for a message now and then: waiting inside MPI takes a core."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def spread(self, message: protocol.Message) -> None:
        for rank in range(1, self._comm.size):
            self._comm.send(message, rank)

    def collect(self, answer: protocol.Message) -> list[protocol.Message]:
        answers: list[protocol.Message] = self._comm.gather(answer)
        return answers


def _follow(comm: Any, actor: protocol.Actor) -> None:
    parent = os.getppid()
    while True:
        while not comm.iprobe(0):
            time.sleep(_NAP_SECONDS)
            if os.getppid() != parent:  # whoever started us is gone
                os._exit(1)
        message = comm.recv(source=0)
        if message["do"] == "end":
            return
        comm.gather(actor.act(message))


def main() -> None:
    """Serve as rank 0, follow as another."""
    line = protocol.Line()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    try:
        actor = protocol.Actor(_AllReduce(MPI), comm.size)
        if comm.rank:
            _follow(comm, actor)
        else:
            version = " ".join(MPI.Get_library_version().replace("\0", "").split())
            ready = {
                "version": version[:80],
                "ranks": comm.size,
                "variants": list(_AllReduce.variants),
            }
            protocol.serve(line, actor, _Ranks(comm), ready)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        comm.Abort(1)  # the others wait inside MPI
