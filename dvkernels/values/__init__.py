"""Distributed values: one component per replica, and the devices that hold them.

Imports: communicators, devices, errors, pytree, reduce_op, replicas, user_errors.
"""
