"""Measuring: the cases, the memory limit beside them, peers, reports.

Behind ``python -m dvkernels bench`` and the asv suite alike.
"""
