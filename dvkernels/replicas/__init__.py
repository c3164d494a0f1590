"""Replicas of one run: a thread each, and the rendezvous where they perform collectives.

Imports: deadlines, devices, errors, kernels, philox, profiler, thread_frames, threads, tracebacks,
user_errors.
"""
