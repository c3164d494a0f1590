"""Threads that neither an interrupt, nor a fork, nor the end of the program breaks.

Imports: deadlines.
"""
