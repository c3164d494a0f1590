"""The CUDA engine: launch tables, the compiled loops that read them, compiler and launcher.

Imports: devices, errors, kernels, reduce_op, schedules.
"""
