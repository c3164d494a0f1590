"""The command line: one module for each verb of ``python -m dvkernels``.

Imports: benchmarks, checkpoint, cluster, devices, errors, kernels, launcher, profiler,
replica_context, replicas, strategies, user_errors.
"""
