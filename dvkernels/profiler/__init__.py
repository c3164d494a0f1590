"""Profiler: traces, debug mode and memory reports; all other packages may record to it.

Imports: cluster, errors, pytree, reduce_op, schedules, thread_frames, threads, user_errors.
"""

from dvkernels.profiler.collective_hooks import CollectiveRecord as CollectiveRecord
from dvkernels.profiler.collective_hooks import on_collective as on_collective
from dvkernels.profiler.memory_report import MemoryReport as MemoryReport
from dvkernels.profiler.memory_report import memory as memory
from dvkernels.profiler.ranges import range as range
from dvkernels.profiler.tracing import trace as trace
