"""JAX: collectives lowered to XLA's, in programs that we compile and in those of ``strategy.jit``.

Imports: communicators, custom_reduction, devices, errors, reduce_op.
"""
