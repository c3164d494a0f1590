"""Engine of the CUDA kernels: launch tables, the loops over them, shipped PTX, compiler, launcher.

Imports: devices, errors, kernels, reduce_op, schedules, threads.
"""
