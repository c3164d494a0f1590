"""Workers: collectives between the processes of a job, over shared memory or MPI.

Imports: cluster, communicators, deadlines, devices, errors, kernels, kernels.cpu,
kernels.cpu.engine, profiler, reduce_op, replicas, schedules, threads, user_errors.
"""
