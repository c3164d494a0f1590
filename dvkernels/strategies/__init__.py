"""Strategies: combinations of devices, a communicator, and a placement of variables.

Imports: cluster, communicators, context, data, deadlines, devices, errors, html_table, kernels,
optimizers, philox, pickling, profiler, pytree, reduce_op, replica_context, replicas, threads,
tracebacks, user_errors, values, variables, verbs.
"""
