"""Engine of the CUDA kernels: launch tables, the loops over them, shipped PTX, compiler, launcher.

Imports: devices, errors, kernels, profiler, reduce_op, schedules, threads.
"""
