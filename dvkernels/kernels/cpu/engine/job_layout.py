"""Layout of a job: the records in which a runner finds the arrays to combine, and the program.

A job's memory holds its header, the items, the rows of the program, the tables, the constants and
the counters. A table lists the addresses of an item's arrays, then, of several lines, their strides
in bytes. The constants are the runner's, float64. The counters lie on a cache line each: first
that of the threads that have joined, then for each queue that of the pieces claimed.

An item is a set of arrays of one shape that are contiguous, or lines of contiguous elements at a
constant stride. Items are split into pieces; a thread runs all rows of the program over its piece.
The pieces are split into queues; a thread begins with its own, then helps in the others.
"""

from __future__ import annotations

from typing import NamedTuple

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels.cpu.engine import records

__all__: list[str] = []

# Pieces are claimed dynamically: small enough that the last one is short (256 KiB a replica takes
# 20 us), large enough that a claim (50 ns) and the restart of the prefetcher are negligible.
PIECE_NBYTES = 512 * 1024
# A job's bytes, read and written, from which on its data lies in memory (the last cache of most
# machines has 32 MiB): those of new results, which then bypass the caches, and those of an
# optimizer's step, whose state is prefetched. All-reduces in place are not: the processor's own
# prefetches are as fast (4 and 8 replicas of 16 and 64 MiB: 0.97 to 1.13 of the speed of C without
# ours, 0.91 to 0.99 with them; medians of three runs, 2 cores of an AMD EPYC, 2026-11).
STREAMED_NBYTES = 32 * 1024 * 1024
PREFETCHED_NBYTES = 96 * 1024 * 1024
MOST_QUEUES = 16


class JobHeader(NamedTuple):
    """Header of a job; by default of one item and one row."""

    num_pieces: int = 0
    pieces_per_claim: int = 1
    piece_length: int = 0  # most elements of a line in a piece
    num_items: int = 1
    num_rows: int = 1
    num_arrays: int = 0  # entries of a table
    num_parts: int = 1  # of an item, to which the rows refer
    num_queues: int = 1
    in_memory: int = 0  # the argument of span
    runner: int = 0  # its address
    items: int = 0  # the address of the first
    rows: int = 0
    constants: int = 0
    counters: int = 0


class Item(NamedTuple):
    """Arrays of one shape, which the rows combine element by element."""

    first_piece: int = 0
    length: int = 0  # elements of a line
    num_lines: int = 1
    table: int = 0  # its address


class Row(NamedTuple):
    """Row of the program: combine arrays of the table, divide, and store to others."""

    part: int = -1  # of the item; -1: all of it
    first_source: int = 0
    num_sources: int = 0
    first_target: int = 0
    num_targets: int = 0
    divisor: int = 1


class Counter(NamedTuple):
    """Number that the threads of a job increase."""

    value: int


HEADER_WORDS, ITEM_WORDS, ROW_WORDS = (len(kind._fields) for kind in (JobHeader, Item, Row))
COUNTER_WORDS = records.LINE_NBYTES // 8
_COUNTERS = JobHeader._fields.index("counters")


def counters_after(offset: int) -> int:
    """Return the first offset in words, not before another, at which a counter may lie."""
    return -(-offset // COUNTER_WORDS) * COUNTER_WORDS


def first_counter(words: HostArray, address: int) -> int:
    """Return the index of the first counter among the words of a job at an address."""
    return (int(words[_COUNTERS]) - address) // 8


job_at = records.view(records.layout(JobHeader))
item_at = records.nth(records.layout(Item))
row_at = records.nth(records.layout(Row))
counter_at = records.nth(records.layout(Counter, nbytes=records.LINE_NBYTES))
