"""Distributed datasets: global batches, sharded over workers and split over replicas.

Imports: communicators, communicators.jax, communicators.workers, data, devices, enumeration,
errors, html_table, profiler, pytree, reduce_op, replicas, schedules, tracebacks, user_errors,
values.
"""
