"""Peer libraries of the benchmarks: each worker is a script for an environment that has the peer.

Imports: benchmarks, communicators, communicators.workers, devices, errors, reduce_op, strategies.
"""
