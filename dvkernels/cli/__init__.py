"""The command line: one module for each verb of ``python -m dvkernels``.

Imports: benchmarks, checkpoint, cluster, context, data, devices, errors, kernels, launcher,
profiler, strategies, user_errors, variables.
"""
