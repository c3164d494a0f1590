"""The command line: one module for each verb of ``python -m dvkernels``.

Imports: benchmarks, checkpoint, cluster, communicators, context, data, devices, errors, kernels,
launcher, profiler, strategies, user_errors, variables.
"""
