"""Kernel of an all-reduce by flags: a launch runs its rank's rows of a protocol.

A block synchronizes with the blocks of the same index on the other devices only: these access the
same elements, and no block waits for another block of its own launch. schedules/flag_protocol.py
defines the rows, testing/ proves the protocols; a device implements the rows as follows:

* Signal: after a barrier of the block (``bar.sync``), one thread per peer stores the epoch into the
  flag in the peer's memory (``st.release.sys``). Release and barrier are cumulative: a thread that
  acquires the flag sees the writes of every thread of the block, and its own later writes come
  after the block's reads.
* Wait: one thread per peer polls a flag in its own memory (``ld.acquire.sys``), then the block has
  a barrier. A flag has one writer, so the store needs no atomic operation.
* A wait for a signal that does not come ends when the stop word is set (in host memory, polled
  every 64th time) or at its deadline, when the waiting thread sets the stop word. In both cases the
  block records the ranks that it waited for, and exits. The results of such a call are undefined on
  all ranks.

Program of a rank, int64 words that stay in its device memory:

    [0] rows   [1] bytes from a block's flags to the next block's   [2] address of the stop word
    rows, seven words each:  combine, part, offset and number of sources, of targets, completes
                             signal, stage, offset and number of flags, 0, 0, 0
                             wait, stage, offset and number of flags, offset of missed words, 0, 0
    lists: indices of addresses, addresses of flags, addresses of missed words (one per peer)

Words of a call, passed with the launch:

    [0] address of the program   [1] the epoch before its first   [2] elements   [3] divisor
    [4] deadline of a wait in nanoseconds   [5] row to run, where a launch runs one row
    [6] lines in a block's share of a part   [7] number of shares with one line more
    addresses: the inputs of all ranks, the outputs of all ranks, the slots of all ranks
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
    "combine_kernel",
    "program_words",
    "shares",
    "waiting_kernel",
]

cuda: Any = numba_cuda  # its functions carry no types

_COMBINE, _SIGNAL, _WAIT = range(3)
_HEADER, _WIDTH = 3, 7
CALL_HEADER = 8
_MEMORIES: tuple[Memory, ...] = ("input", "output", "slot")
_POLLS = 64  # between reads of the clock and of the stop word, which take 1 us over PCIe
_NAP_NS = 100


class SharedAddresses(NamedTuple):
    """Addresses of the flags and words that the ranks share."""

    flags: Sequence[int]  # of each rank: the flags that it waits for, per block one per writer
    missed: Sequence[int]  # of each rank: the word for the epoch in which this rank missed it
    stop: int


def program_words(protocol: Protocol, rank: int, addresses: SharedAddresses) -> list[int]:
    """Return the words of a rank's program."""
    num_ranks = protocol.num_ranks
    rows = protocol.rows[rank]
    lists: list[int] = []
    lists_begin = _HEADER + _WIDTH * len(rows)

    def append_list(words: Sequence[int]) -> int:
        lists.extend(words)
        return lists_begin + len(lists) - len(words)

    words = [len(rows), 8 * num_ranks, addresses.stop]
    for row in rows:
        if isinstance(row, Combine):
            sources, targets = (
                [_MEMORIES.index(buffer.memory) * num_ranks + buffer.rank for buffer in buffers]
                for buffers in (row.sources, row.targets)
            )
            completes = int(row.completes)
            words += (_COMBINE, row.part, append_list(sources), len(sources))
            words += (append_list(targets), len(targets), completes)
        elif isinstance(row, Signal):
            flags = [addresses.flags[peer] + 8 * rank for peer in row.ranks]
            words += (_SIGNAL, row.stage, append_list(flags), len(flags), 0, 0, 0)
        else:
            flags = [addresses.flags[rank] + 8 * peer for peer in row.ranks]
            missed = [addresses.missed[peer] for peer in row.ranks]
            words += (_WAIT, row.stage, append_list(flags), len(flags), append_list(missed), 0, 0)
    return words + lists


def call_words(
    program: int,
    epoch: int,
    length: int,
    divisor: int,
    deadline_ns: int,
    row: int,
    share_widths: tuple[int, int],
    addresses: Sequence[int],
) -> tuple[int, ...]:
    """Return the words of a call."""
    return (program, epoch, length, divisor, deadline_ns, row, *share_widths, *addresses)


def shares(length: int, itemsize: int, num_parts: int, num_blocks: int) -> tuple[int, int]:
    """Return the lines of a share, and the number of shares with one line more.

    A buffer is cut into parts, and each part into one share per block; shares are as even as whole
    lines allow, and those of a part are adjacent.
    """
    line = span.LINE_NBYTES // itemsize
    return partition.widths(-(-length // line), num_parts * num_blocks)


@cuda.jit(device=True, inline="always")
def _await(flag, epoch, stop, deadline_ns):  # type: ignore[no-untyped-def]
    """Return 0 when a flag is at ``epoch``, 1 if the stop word is set, 2 at the deadline."""
    polls = 0
    start_ns = intrinsics.clock_ns()
    while intrinsics.acquire(flag) < epoch:
        polls += 1
        if polls % _POLLS == 0:
            if intrinsics.load_relaxed(stop) != 0:
                return 1
            if intrinsics.clock_ns() - start_ns > deadline_ns:
                return 2
            intrinsics.nanosleep(_NAP_NS)
    return 0


@functools.cache
def _row(operation: Operation, code: int) -> Any:
    """Return the device function that runs a Combine row."""
    line = span.LINE_NBYTES // arithmetic.dtype_of(code).itemsize
    combine = span.combiner(operation, code)

    @cuda.jit(device=True, inline="always")
    def run(call, program, row):  # type: ignore[no-untyped-def]
        length, smaller_share, num_larger = (
            launch_table.entry(call, 2),
            launch_table.entry(call, 6),
            launch_table.entry(call, 7),
        )
        share = launch_table.entry(row, 1) * cuda.gridDim.x + cuda.blockIdx.x
        begin = min(span.start(smaller_share, num_larger, share) * line, length)
        end = min(span.start(smaller_share, num_larger, share + 1) * line, length)
        divisor = launch_table.entry(call, 3) if launch_table.entry(row, 6) else 1
        combine(
            call + 8 * CALL_HEADER,
            program + 8 * launch_table.entry(row, 2), launch_table.entry(row, 3),
            program + 8 * launch_table.entry(row, 4), launch_table.entry(row, 5),
            begin, end, divisor,
        )  # fmt: skip

    return run


@functools.cache
def combine_kernel(operation: Operation, code: int) -> Callable[..., None]:
    """Return the kernel that runs one Combine row, without waiting."""
    run_row = _row(operation, code)

    def run(words):  # type: ignore[no-untyped-def]
        call = launch_table.stage(words)
        program = launch_table.entry(call, 0)
        run_row(call, program, program + 8 * (_HEADER + _WIDTH * launch_table.entry(call, 5)))

    return run


@functools.cache
def waiting_kernel(operation: Operation, code: int) -> Callable[..., None]:
    """Return the kernel that runs all rows of a rank, and waits for the other ranks."""
    run_row = _row(operation, code)

    def run(words):  # type: ignore[no-untyped-def]
        call = launch_table.stage(words)
        program = launch_table.entry(call, 0)
        for number in range(launch_table.entry(program, 0)):
            row = program + 8 * (_HEADER + _WIDTH * number)
            kind = launch_table.entry(row, 0)
            if kind == _COMBINE:
                run_row(call, program, row)
                continue
            # Read again for each row: values kept across rows would cost registers in run_row.
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
                outcome = _await(
                    launch_table.entry(flags, thread) + own_flags, wanted, stop, deadline_ns
                )
                if outcome != 0:
                    missed = launch_table.entry(program + 8 * launch_table.entry(row, 4), thread)
                    intrinsics.store_relaxed(missed, wanted)
                if outcome == 2:
                    intrinsics.release(stop, 1)
                failed |= outcome
                thread += threads
            if cuda.syncthreads_or(failed):
                return

    return run
