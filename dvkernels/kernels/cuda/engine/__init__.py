"""Engine of the CUDA kernels: launch tables, the compiled loops over them, compiler, launcher.

Imports: devices, errors, kernels, profiler, reduce_op, schedules, threads.
"""
