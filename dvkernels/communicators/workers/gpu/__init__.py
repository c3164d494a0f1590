"""GPU arrays between workers: staged through pinned host memory, or by CUDA-aware MPI.

Imports: communicators, communicators.workers, devices, errors, kernels, reduce_op, schedules.
"""
