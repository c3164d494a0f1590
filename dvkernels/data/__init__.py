"""Datasets: chains of sources and transforms, and iterators that resume from a position.

Imports: communicators, deadlines, devices, enumeration, errors, html_table, kernels, philox,
profiler, pytree, reduce_op, replicas, schedules, threads, tracebacks, user_errors, values.
"""
