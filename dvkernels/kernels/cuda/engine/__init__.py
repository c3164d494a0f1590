"""Engine of the CUDA kernels: launch tables, the compiled loops over them, compiler, launcher.

Imports: devices, errors, kernels, reduce_op, schedules, threads.
"""
