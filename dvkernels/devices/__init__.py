"""Devices of this machine, and the arrays on them, of NumPy, CuPy and other libraries.

Imports: cluster, errors, profiler, threads, user_errors.
"""
