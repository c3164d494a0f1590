"""The launcher: starts the workers of a job by an MPI, watches them, and clears up behind them.

Imports: checkpoint, cluster, communicators, deadlines, errors.
"""
