"""Distributed values: one component per replica, and where the replicas' values live.

Imports: communicators, devices, errors, nest, reduce_op, replicas, schedules, user_errors.
"""
