"""Replicas of one run: a thread each, and the rendezvous where they perform collectives.

Imports: deadlines, devices, errors, kernels, pytree, profiler, thread_frames, threads, user_errors.
"""
