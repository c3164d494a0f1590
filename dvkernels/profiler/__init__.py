"""The profiler: traces, debug mode and memory reports, which every room may record to.

Imports: errors, reduce_op, user_errors.
"""

from dvkernels.profiler.memory_report import MemoryReport as MemoryReport
from dvkernels.profiler.memory_report import memory as memory
from dvkernels.profiler.tracing import trace as trace
