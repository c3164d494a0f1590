"""Distributed values: one component per replica, and the devices that hold them.

Imports: communicators, custom_reduction, devices, errors, html_table, kernels, philox, pytree,
reduce_op, replicas, user_errors.
"""
