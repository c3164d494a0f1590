"""Restoring: a reader of one checkpoint, a plan for the program's objects, and its execution.

Imports: checkpoint, checkpoint.format, checkpoint.storage, communicators, devices, errors,
html_table, profiler, threads, user_errors, variables.
"""
