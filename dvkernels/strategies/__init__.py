"""Strategies: combinations of devices, a communicator, and a placement of variables.

Imports: cluster, communicators, context, custom_reduction, data, devices, errors, kernels, pytree,
profiler, reduce_op, replica_context, replicas, user_errors, values, variables.
"""
