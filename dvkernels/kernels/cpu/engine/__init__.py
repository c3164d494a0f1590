"""The CPU engine: jobs, the compiled loops that run them, the thread pool, gates and barriers.

Imports: custom_reduction, deadlines, devices, errors, kernels, reduce_op, schedules, threads.
"""
