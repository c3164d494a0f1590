"""Strategies: combinations of devices, a communicator, and a placement of variables.

Imports: cluster, communicators, context, data, deadlines, devices, errors, philox, profiler,
pytree, reduce_op, replica_context, replicas, user_errors, values, variables, verbs.
"""
