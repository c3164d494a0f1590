"""NCCL: communicator of GPUs over NVIDIA's library, called through CuPy.

Imports: communicators, communicators.workers, devices, errors, kernels.cuda.engine, reduce_op,
schedules, threads, user_errors.
"""
