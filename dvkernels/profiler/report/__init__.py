"""Report of a trace: where the time of its steps goes, who is late, and what to change.

Imports: errors, profiler.
"""
