"""Shared-memory transport: collectives between the workers of one host.

Imports: cluster, communicators, communicators.workers, devices, errors, kernels, kernels.cpu,
kernels.cpu.engine, reduce_op, schedules, threads, user_errors.
"""
