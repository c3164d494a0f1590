"""Communicators: the same collectives over the replicas of a process, its workers, and NCCL.

Imports: cluster, custom_reduction, deadlines, devices, errors, kernels, reduce_op, replicas,
schedules, threads, user_errors.
"""
