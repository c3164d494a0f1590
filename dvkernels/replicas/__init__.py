"""The replicas of one run: a thread each, and the rendezvous at which they meet.

Imports: deadlines, devices, errors, kernels, nest, profiler, threads, user_errors.
"""
