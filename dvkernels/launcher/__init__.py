"""The launcher: starts the workers of a job, a program or a function, and ends them all.

Imports: cluster, communicators, deadlines, devices, errors, pickling, threads,
tracebacks, user_errors.
"""
