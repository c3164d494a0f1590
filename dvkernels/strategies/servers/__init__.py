"""Servers in other processes: requests to them, and the loops of servers and workers.

Imports: cluster, communicators, communicators.workers, context, deadlines, devices, errors,
optimizers, pickling, profiler, replicas, strategies, threads, tracebacks, user_errors, values,
variables.
"""
