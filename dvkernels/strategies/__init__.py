"""Strategies: combinations of devices, a communicator, and a placement of variables.

Imports: cluster, communicators, context, custom_reduction, data, devices, errors, kernels, nest,
profiler, reduce_op, replicas, user_errors, values, variables.
"""
