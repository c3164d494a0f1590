"""Shared-memory transport: collectives between the workers of one host.

Imports: cluster, communicators, communicators.workers, devices, errors, kernels, kernels.cpu,
kernels.cpu.engine, profiler, reduce_op, schedules, threads, user_errors.
"""
