"""Storage: operations on files, folders that appear whole or not at all, locks and parallel I/O.

Imports: devices, errors, thread_frames, threads, user_errors.
"""
