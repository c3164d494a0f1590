"""Benchmark cases, probes, stopwatch and reports, for ``python -m dvkernels bench`` and for asv.

Imports: cluster, communicators, devices, errors, kernels, profiler, reduce_op, schedules.
"""
