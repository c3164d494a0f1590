"""Workers: collectives between processes, over the transport that connects them.

Imports: cluster, communicators, deadlines, devices, errors, kernels, kernels.cpu,
kernels.cpu.engine, reduce_op, replicas, schedules, user_errors.
"""
