"""Saving: a snapshot of the objects, its files, and saves in the background.

Imports: checkpoint, checkpoint.format, checkpoint.storage, communicators, devices, errors,
profiler, threads, user_errors, variables.
"""
