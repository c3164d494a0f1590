"""All-reduce between the GPUs of a process: kernels that synchronize by flags in peer memory.

Imports: devices, errors, kernels, kernels.cuda.engine, reduce_op, schedules.
"""
