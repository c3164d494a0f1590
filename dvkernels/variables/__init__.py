"""Variables: state with one copy per replica, kept consistent by a synchronization mode.

Imports: communicators, context, devices, enumeration, errors, profiler, pytree,
reduce_op, replica_context, replicas, user_errors, values.
"""
