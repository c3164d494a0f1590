"""Replicas of one run: a thread each, and the rendezvous where they perform collectives.

Imports: deadlines, devices, errors, kernels, nest, profiler, threads, user_errors.
"""
