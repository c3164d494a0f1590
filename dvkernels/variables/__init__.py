"""Variables: state with one copy per replica, kept consistent by a synchronization mode.

Imports: communicators, context, deadlines, devices, enumeration, errors, html_table, kernels,
profiler, pytree, reduce_op, replica_context, replicas, schedules, user_errors, values.
"""
