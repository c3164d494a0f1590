"""Distributed datasets: global batches, sharded over workers and split over replicas.

Imports: communicators, communicators.workers, data, devices, enumeration, errors, pytree, profiler,
reduce_op, replicas, schedules, user_errors, values.
"""
