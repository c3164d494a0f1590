"""Threads and calls that interrupts, forks and the end of the program leave intact.

Imports: deadlines, thread_frames.
"""
