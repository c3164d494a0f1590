"""The kernel of ranks that wait for each other: a launch runs its rank's rows of a protocol.

A block meets the blocks of its own number on the other devices, and only those: they touch the
same elements, and no block waits for another of its launch. What the rows say is told in
schedules/flag_protocol.py and proven in testing/; here stands how a device does it:

* Signal: all threads have come (``bar.sync``), then one thread a peer stores the epoch into the
  flag in the peer's memory (``st.release.sys``). Release and barrier are cumulative: who acquires
  the flag sees what every thread of the block has written, and comes after what it has read.
* Wait: one thread a peer polls its own memory (``ld.acquire.sys``), then all threads meet. A flag
  has one writer, so storing needs no atomic operation.
* A wait that is not answered ends when the stop word is set (in memory of the host, looked at
  every 64th poll) or at its deadline; then it sets that word itself. Either way the block says for
  whom it has waited, and leaves. What a call leaves behind then is undefined, everywhere.

The program of a rank, words in its memory that stay:

    [0] rows   [1] bytes from a block's flags to the next block's   [2] address of the stop word
    rows, seven words each:  combine, part, where sources, how many, where targets, how many, ends
                             signal, stage, where flags, how many, 0, 0, 0
                             wait, stage, where flags, how many, where words to miss, 0, 0
    lists: numbers of places, addresses of flags, addresses of words that say who was missed

A call, words that travel with the launch:

    [0] address of the program   [1] the epoch before its first   [2] elements   [3] divisor
    [4] nanoseconds that a wait may take   [5] the row, where a launch runs one
    [6] lines of a block's share of a part   [7] how many shares have one more
    places: the inputs of all ranks, the outputs of all, the slots of all
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from numba import cuda as numba_cuda

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import intrinsics, launch_table, span
from dvkernels.kernels.cuda.engine.operations import Operation
from dvkernels.schedules import partition
from dvkernels.schedules.flag_protocol import Combine, Memory, Protocol, Signal

__all__ = [
    "CALL_HEADER",
    "SharedAddresses",
    "call_words",
    "program_words",
    "row_kernel",
    "shares",
    "waiting_kernel",
]

cuda: Any = numba_cuda  # its functions carry no types

_COMBINE, _SIGNAL, _WAIT = range(3)
_HEADER, _WIDTH = 3, 7
CALL_HEADER = 8
_MEMORIES: tuple[Memory, ...] = ("input", "output", "slot")
_POLLS = 64  # between looks at the clock and the stop word, which takes a microsecond over PCIe
_NAP_NS = 100


class SharedAddresses(NamedTuple):
    """Where a rank finds what all share; addresses."""

    flags: Sequence[int]  # of each rank, those that it waits for: of each block, one a writer
    missed: Sequence[int]  # of each rank, the word that says for which epoch this rank missed it
    stop: int


def program_words(protocol: Protocol, rank: int, links: SharedAddresses) -> list[int]:
    """Return the words of a rank's program."""
    num_ranks = protocol.num_ranks
    rows = protocol.rows[rank]
    lists: list[int] = []
    lists_at = _HEADER + _WIDTH * len(rows)

    def put(words: Sequence[int]) -> int:
        lists.extend(words)
        return lists_at + len(lists) - len(words)

    words = [len(rows), 8 * num_ranks, links.stop]
    for row in rows:
        if isinstance(row, Combine):
            sources, targets = (
                [_MEMORIES.index(place.memory) * num_ranks + place.rank for place in places]
                for places in (row.sources, row.targets)
            )
            ends = int(row.completes)
            words += (_COMBINE, row.part, put(sources), len(sources))
            words += (put(targets), len(targets), ends)
        elif isinstance(row, Signal):
            flags = [links.flags[peer] + 8 * rank for peer in row.ranks]
            words += (_SIGNAL, row.stage, put(flags), len(flags), 0, 0, 0)
        else:
            flags = [links.flags[rank] + 8 * peer for peer in row.ranks]
            missed = [links.missed[peer] for peer in row.ranks]
            words += (_WAIT, row.stage, put(flags), len(flags), put(missed), 0, 0)
    return words + lists


def call_words(
    program: int,
    epoch: int,
    length: int,
    divisor: int,
    deadline_ns: int,
    row: int,
    share: tuple[int, int],
    places: Sequence[int],
) -> tuple[int, ...]:
    """Return the words of a call."""
    return (program, epoch, length, divisor, deadline_ns, row, *share, *places)


def shares(length: int, itemsize: int, num_parts: int, num_blocks: int) -> tuple[int, int]:
    """Return how a buffer is cut: into parts, and each of those into one share a block.

    As evenly as whole lines go; the shares of a part lie side by side.
    """
    line = span.LINE_NBYTES // itemsize
    return partition.widths(-(-length // line), num_parts * num_blocks)


@cuda.jit(device=True, inline="always")
def _await(flag, epoch, stop, deadline_ns):  # type: ignore[no-untyped-def]
    """Return 0 when a flag has come to ``epoch``, 1 if all must stop, 2 after the deadline."""
    polls = 0
    began = intrinsics.clock_ns()
    while intrinsics.acquire(flag) < epoch:
        polls += 1
        if polls % _POLLS == 0:
            if intrinsics.load_relaxed(stop) != 0:
                return 1
            if intrinsics.clock_ns() - began > deadline_ns:
                return 2
            intrinsics.nanosleep(_NAP_NS)
    return 0


@functools.cache
def _row(operation: Operation, code: int) -> Any:
    """Return the device function that runs a row that combines."""
    line = span.LINE_NBYTES // arithmetic.dtype_of(code).itemsize
    combine = span.combiner(operation, code)

    @cuda.jit(device=True, inline="always")
    def run(call, program, row):  # type: ignore[no-untyped-def]
        length, small, num_larger = (
            launch_table.entry(call, 2),
            launch_table.entry(call, 6),
            launch_table.entry(call, 7),
        )
        share = launch_table.entry(row, 1) * cuda.gridDim.x + cuda.blockIdx.x
        begin = min(span.start(small, num_larger, share) * line, length)
        end = min(span.start(small, num_larger, share + 1) * line, length)
        divisor = launch_table.entry(call, 3) if launch_table.entry(row, 6) else 1
        combine(
            call + 8 * CALL_HEADER,
            program + 8 * launch_table.entry(row, 2), launch_table.entry(row, 3),
            program + 8 * launch_table.entry(row, 4), launch_table.entry(row, 5),
            begin, end, divisor,
        )  # fmt: skip

    return run


@functools.cache
def row_kernel(operation: Operation, code: int) -> Callable[..., None]:
    """Return the function that runs one row that combines, and waits for nobody."""
    run_row = _row(operation, code)

    def run(words):  # type: ignore[no-untyped-def]
        call = launch_table.hold(words)
        program = launch_table.entry(call, 0)
        run_row(call, program, program + 8 * (_HEADER + _WIDTH * launch_table.entry(call, 5)))

    return run


@functools.cache
def waiting_kernel(operation: Operation, code: int) -> Callable[..., None]:
    """Return the function that runs all rows of a rank, and waits for the others."""
    run_row = _row(operation, code)

    def run(words):  # type: ignore[no-untyped-def]
        call = launch_table.hold(words)
        program = launch_table.entry(call, 0)
        for number in range(launch_table.entry(program, 0)):
            row = program + 8 * (_HEADER + _WIDTH * number)
            kind = launch_table.entry(row, 0)
            if kind == _COMBINE:
                run_row(call, program, row)
                continue
            # All of this is read again for each row: what is kept costs registers in run_row.
            wanted, count = (
                launch_table.entry(call, 1) + launch_table.entry(row, 1),
                launch_table.entry(row, 3),
            )
            own_flags = cuda.blockIdx.x * launch_table.entry(program, 1)
            threads, thread = cuda.blockDim.x, cuda.threadIdx.x
            flags = program + 8 * launch_table.entry(row, 2)
            if kind == _SIGNAL:
                cuda.syncthreads()
                while thread < count:
                    intrinsics.release(launch_table.entry(flags, thread) + own_flags, wanted)
                    thread += threads
                continue
            stop, deadline_ns = launch_table.entry(program, 2), launch_table.entry(call, 4)
            failed = 0
            while thread < count:
                end = _await(
                    launch_table.entry(flags, thread) + own_flags, wanted, stop, deadline_ns
                )
                if end != 0:
                    missed = launch_table.entry(program + 8 * launch_table.entry(row, 4), thread)
                    intrinsics.store_relaxed(missed, wanted)
                if end == 2:
                    intrinsics.release(stop, 1)
                failed |= end
                thread += threads
            if cuda.syncthreads_or(failed):
                return

    return run
