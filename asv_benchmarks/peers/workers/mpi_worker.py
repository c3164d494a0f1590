"""Worker that all-reduces by MPI, in place and out of place; the shorter time counts."""

from __future__ import annotations

import mpi_commands
import numpy as np
import protocol
from mpi4py import MPI

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()


def seconds_of(send, receive, steady, iterations):
    """Return the seconds per call on the slowest rank; each portion has an untimed call first."""
    elapsed = 0.0
    for portion in protocol.portions(iterations, size):
        receive[:] = steady
        comm.Allreduce(send, receive, op=MPI.SUM)
        comm.Barrier()
        started = MPI.Wtime()
        for _ in range(portion):
            comm.Allreduce(send, receive, op=MPI.SUM)
        elapsed += MPI.Wtime() - started
    return comm.allreduce(elapsed / iterations, op=MPI.MAX)


answer = protocol.claim_stdout()
checked: dict = {}  # arrays and wrong elements of the current count and dtype
for command in mpi_commands.each(comm, protocol.commands()):
    count, dtype, iterations = command["count"], command["dtype"], command["iterations"]
    if (count, dtype) not in checked:
        every = protocol.inputs(count, size, dtype)
        send, receive = every[rank].copy(), np.empty(count, dtype)
        expected = np.sum(every, axis=0, dtype=dtype)
        del every
        comm.Allreduce(send, receive, op=MPI.SUM)
        wrong = int((receive != expected).sum())
        comm.Allreduce(MPI.IN_PLACE, send, op=MPI.SUM)
        wrong += int((send != expected).sum())
        send = protocol.steady(count, size, dtype)[rank]
        checked = {(count, dtype): (send, receive, comm.allreduce(wrong))}
    send, receive, wrong = checked[count, dtype]
    out_of_place = seconds_of(send, receive, send, iterations)
    in_place = seconds_of(MPI.IN_PLACE, receive, send, iterations)
    if rank == 0:
        note = "in place" if in_place <= out_of_place else "out of place"
        answer(seconds=min(in_place, out_of_place), wrong=wrong, note=note)
