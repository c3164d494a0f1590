"""Peer libraries of the benchmarks: worker scripts that run in the environment of each library.

Imports: benchmarks, communicators, communicators.workers, devices, errors, reduce_op, strategies.
"""
