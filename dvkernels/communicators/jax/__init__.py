"""JAX: collectives lowered to XLA's, in programs that we compile and in those of ``strategy.jit``.

Imports: cluster, communicators, communicators.workers, communicators.workers.shm,
custom_reduction, deadlines, devices, errors, kernels, reduce_op, schedules, user_errors.
"""
