"""Coordinator: calls handed out to the workers of a parameter-server strategy, and their results.

Imports: context, deadlines, errors, optimizers, pickling, profiler, pytree, replicas, strategies,
thread_frames, threads, user_errors, values, variables.
"""
