"""Benchmark cases, probes, stopwatch and reports, for ``python -m dvkernels bench`` and for asv.

Imports: checkpoint, cluster, communicators, context, data, devices, errors, kernels, profiler,
reduce_op, schedules, strategies, variables.
"""
