"""MPI transport: collectives between hosts over non-blocking point-to-point messages.

Imports: cluster, communicators, communicators.workers, communicators.workers.shm, devices, errors,
kernels.cpu, reduce_op, schedules.
"""
