"""Variables: one name for copies on all replicas, kept in step by their synchronization mode.

Imports: communicators, context, deadlines, devices, enumeration, errors, profiler, reduce_op,
replicas, user_errors, values.
"""
