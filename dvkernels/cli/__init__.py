"""The command line: one module for each verb of ``python -m dvkernels``.

Imports: benchmarks, checkpoint, cluster, data, devices, errors, kernels, launcher, profiler,
replica_context, replicas, strategies, user_errors, variables.
"""
