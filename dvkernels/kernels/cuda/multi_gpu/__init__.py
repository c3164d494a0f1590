"""All-reduce between the GPUs of a process: kernels that wait for each other's flags.

Imports: devices, errors, kernels, kernels.cuda.engine, reduce_op, schedules.
"""
