"""All-reduce by the MPI of this environment: in place and out of place, the better of both."""

from __future__ import annotations

import mpi_commands
import numpy as np
import protocol
from mpi4py import MPI

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()


def seconds_of(send, receive, steady, iterations):
    """Return the seconds that one call takes, on the slowest rank; of each portion one more."""
    elapsed = 0.0
    for portion in protocol.portions(iterations, size):
        receive[:] = steady
        comm.Allreduce(send, receive, op=MPI.SUM)
        comm.Barrier()
        began = MPI.Wtime()
        for _ in range(portion):
            comm.Allreduce(send, receive, op=MPI.SUM)
        elapsed += MPI.Wtime() - began
    return comm.allreduce(elapsed / iterations, op=MPI.MAX)


answer = protocol.answers_go_to()
held: dict = {}
for command in mpi_commands.each(comm, protocol.commands()):
    count, dtype, iterations = command["count"], command["dtype"], command["iterations"]
    if (count, dtype) not in held:
        every = protocol.inputs(count, size, dtype)
        send, receive = every[rank].copy(), np.empty(count, dtype)
        expected = np.sum(every, axis=0, dtype=dtype)
        del every
        comm.Allreduce(send, receive, op=MPI.SUM)
        wrong = int((receive != expected).sum())
        comm.Allreduce(MPI.IN_PLACE, send, op=MPI.SUM)
        wrong += int((send != expected).sum())
        send = protocol.steady(count, size, dtype)[rank]
        held = {(count, dtype): (send, receive, comm.allreduce(wrong))}
    send, receive, wrong = held[count, dtype]
    apart = seconds_of(send, receive, send, iterations)
    in_place = seconds_of(MPI.IN_PLACE, receive, send, iterations)
    if rank == 0:
        note = "in place" if in_place <= apart else "out of place"
        answer(seconds=min(in_place, apart), wrong=wrong, note=note)
