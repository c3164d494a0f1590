"""Devices: which exist, and the arrays that lie on them, of NumPy, CuPy and other libraries.

Imports: cluster, deadlines, errors, threads, user_errors.
"""
