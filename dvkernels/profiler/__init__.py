"""Profiler: traces, debug mode and memory reports; all other packages may record to it.

Imports: errors, reduce_op, thread_frames, user_errors.
"""

from dvkernels.profiler.memory_report import MemoryReport as MemoryReport
from dvkernels.profiler.memory_report import memory as memory
from dvkernels.profiler.tracing import trace as trace
