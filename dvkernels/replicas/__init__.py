"""Replicas of one run: a thread each, and the rendezvous where they perform collectives.

Imports: deadlines, devices, errors, kernels, pytree, profiler, threads, user_errors.
"""
