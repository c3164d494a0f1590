"""The CPU engine: jobs, the compiled loops that run them, the thread pool and the barriers below.

Imports: custom_reduction, deadlines, devices, errors, kernels, reduce_op, schedules, threads.
"""
