"""Communicators: one set of collectives over replicas of a process, worker processes, and NCCL.

Imports: cluster, custom_reduction, deadlines, devices, errors, kernels, profiler, reduce_op,
replicas, schedules, threads, user_errors.
"""
