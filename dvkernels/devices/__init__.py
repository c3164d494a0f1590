"""Devices of this machine, and the arrays on them, of NumPy, CuPy and other libraries.

Imports: cluster, errors, html_table, profiler, threads, user_errors.
"""
