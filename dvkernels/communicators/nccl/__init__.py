"""NCCL: communicator of GPUs over NVIDIA's library, called through CuPy.

Imports: communicators, communicators.workers, devices, errors, reduce_op, schedules, threads,
user_errors.
"""
