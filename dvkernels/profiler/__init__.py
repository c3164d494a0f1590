"""What happened when, and what takes how much: a leaf that everything may report to."""

from dvkernels.profiler.accounts import MemoryReport as MemoryReport
from dvkernels.profiler.accounts import memory as memory
from dvkernels.profiler.tracing import trace as trace
