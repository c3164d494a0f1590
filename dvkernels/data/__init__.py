"""Datasets: chains of sources and transforms, and iterators that resume from a position.

Imports: communicators, deadlines, devices, enumeration, errors, kernels, philox, profiler, pytree,
reduce_op, replicas, schedules, threads, user_errors, values.
"""
