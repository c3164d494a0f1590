"""Devices of this machine, and the arrays on them, of NumPy, CuPy and other libraries.

Imports: cluster, deadlines, errors, threads, user_errors.
"""
