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

The program of a rank stays in its device memory: a ``ProgramHeader``, a ``CombineRow`` or a
``FlagRow`` for each row, and the lists that the rows refer to. With each launch come a
``LaunchHeader`` and the addresses of the inputs, the outputs and the slots of all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from numba import cuda as numba_cuda

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import intrinsics, launch_table, records, span
from dvkernels.kernels.cuda.engine.operations import Operation
from dvkernels.schedules import partition
from dvkernels.schedules.flag_protocol import Combine, Memory, Protocol, Signal

__all__ = [
    "LaunchHeader",
    "SharedAddresses",
    "combine_kernel",
    "flags_nbytes",
    "program_words",
    "shares",
    "waiting_kernel",
]

cuda: Any = numba_cuda  # its functions carry no types

_COMBINE, _SIGNAL, _WAIT = range(3)
_MEMORIES: tuple[Memory, ...] = ("input", "output", "slot")
_POLLS = 64  # between reads of the clock and of the stop word, which take 1 us over PCIe
_NAP_NS = 100


class SharedAddresses(NamedTuple):
    """Addresses of the flags and words that the ranks share."""

    flags: Sequence[int]  # of each rank: the flags that it waits for, per block one per writer
    missed: Sequence[int]  # of each rank: the word for the epoch in which this rank missed it
    stop: int


class LaunchHeader(NamedTuple):
    """First words of a launch."""

    program: int  # its address
    epoch: int  # before the first of the call
    length: int
    divisor: int
    deadline_ns: int  # of a wait
    row: int  # the row to run, where a launch runs one
    share: int  # lines in a block's share of a part
    num_larger: int  # shares with one line more


class ProgramHeader(NamedTuple):
    """First words of a program."""

    num_rows: int
    flags_nbytes: int  # from a block's flags to the next block's
    stop: int  # address of the stop word


class CombineRow(NamedTuple):
    """Row that reduces a part; lists are given by their index in the program."""

    kind: int
    part: int
    positions: int  # list of the positions of the sources, then of the targets, in the addresses
    num_sources: int
    num_targets: int
    completes: int


class FlagRow(NamedTuple):
    """Row that signals or waits."""

    kind: int
    stage: int
    flags: int  # list of addresses, one per peer
    num_flags: int
    missed: int  # list of addresses of missed words, one per peer
    unused: int = 0


_launch, _program = records.at(LaunchHeader), records.at(ProgramHeader)
_combine_row, _flag_row = records.at(CombineRow), records.at(FlagRow)
_LAUNCH_NBYTES, _ROW_NBYTES = 8 * len(LaunchHeader._fields), 8 * len(CombineRow._fields)
_ROWS = len(ProgramHeader._fields)  # index of the first row


def flags_nbytes(num_ranks: int) -> int:
    """Return the bytes from a block's flags, one per writer, to the next block's: whole lines.

    So a block does not poll a line that others write for another block.
    """
    return -(-8 * num_ranks // span.LINE_NBYTES) * span.LINE_NBYTES


def program_words(protocol: Protocol, rank: int, addresses: SharedAddresses) -> list[int]:
    """Return the words of a rank's program."""
    num_ranks = protocol.num_ranks
    rows = protocol.rows[rank]
    lists: list[int] = []
    lists_begin = _ROWS + len(CombineRow._fields) * len(rows)

    def append_list(words: Sequence[int]) -> int:
        lists.extend(words)
        return lists_begin + len(lists) - len(words)

    words = [*ProgramHeader(len(rows), flags_nbytes(num_ranks), addresses.stop)]
    for row in rows:
        if isinstance(row, Combine):
            positions = append_list(
                [
                    _MEMORIES.index(buffer.memory) * num_ranks + buffer.rank
                    for buffer in (*row.sources, *row.targets)
                ]
            )
            counts = len(row.sources), len(row.targets)
            words += CombineRow(_COMBINE, row.part, positions, *counts, int(row.completes))
        elif isinstance(row, Signal):
            flags = append_list([addresses.flags[peer] + 8 * rank for peer in row.ranks])
            words += FlagRow(_SIGNAL, row.stage, flags, len(row.ranks), 0)
        else:
            flags = append_list([addresses.flags[rank] + 8 * peer for peer in row.ranks])
            missed = append_list([addresses.missed[peer] for peer in row.ranks])
            words += FlagRow(_WAIT, row.stage, flags, len(row.ranks), missed)
    return words + lists


def shares(length: int, itemsize: int, num_parts: int, num_blocks: int) -> tuple[int, int]:
    """Return the lines of a share, and the number of shares with one line more.

    A buffer is cut into parts, and each part into one share per block; shares are as even as whole
    lines allow, and those of a part are adjacent.
    """
    line = span.LINE_NBYTES // itemsize
    return partition.widths(-(-length // line), num_parts * num_blocks)


@intrinsics.inlined
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
    reduce = span.reducer(operation, code)

    @intrinsics.inlined
    def run(launch, program, row):  # type: ignore[no-untyped-def]
        header, combine = _launch(launch), _combine_row(row)
        share = combine.part * cuda.gridDim.x + cuda.blockIdx.x
        begin = min(span.start(header.share, header.num_larger, share) * line, header.length)
        end = min(span.start(header.share, header.num_larger, share + 1) * line, header.length)
        reduce(
            launch + _LAUNCH_NBYTES,
            program + 8 * combine.positions,
            combine.num_sources,
            combine.num_targets,
            begin,
            end,
            header.divisor if combine.completes else 1,
        )

    return run


@functools.cache
def combine_kernel(operation: Operation, code: int) -> Callable[..., None]:
    """Return the kernel that runs one Combine row, without waiting."""
    run_row = _row(operation, code)

    def run(words):  # type: ignore[no-untyped-def]
        launch = launch_table.stage(words)
        header = _launch(launch)
        row = header.program + 8 * _ROWS + _ROW_NBYTES * header.row
        run_row(launch, header.program, row)

    return run


@functools.cache
def waiting_kernel(operation: Operation, code: int) -> Callable[..., None]:
    """Return the kernel that runs all rows of a rank, and waits for the other ranks."""
    run_row = _row(operation, code)

    def run(words):  # type: ignore[no-untyped-def]
        launch = launch_table.stage(words)
        program = _launch(launch).program
        for number in range(_program(program).num_rows):
            address = program + 8 * _ROWS + _ROW_NBYTES * number
            if _combine_row(address).kind == _COMBINE:
                run_row(launch, program, address)
                continue
            # Read again for each row: values kept across rows would cost registers in run_row.
            header, shared, row = _launch(launch), _program(program), _flag_row(address)
            wanted, flags = header.epoch + row.stage, program + 8 * row.flags
            own_flags = cuda.blockIdx.x * shared.flags_nbytes
            threads, thread = cuda.blockDim.x, cuda.threadIdx.x
            if row.kind == _SIGNAL:
                cuda.syncthreads()
                while thread < row.num_flags:
                    intrinsics.release(launch_table.entry(flags, thread) + own_flags, wanted)
                    thread += threads
                continue
            failed = 0
            while thread < row.num_flags:
                flag = launch_table.entry(flags, thread) + own_flags
                outcome = _await(flag, wanted, shared.stop, header.deadline_ns)
                if outcome != 0:
                    missed = launch_table.entry(program + 8 * row.missed, thread)
                    intrinsics.store_relaxed(missed, wanted)
                if outcome == 2:
                    intrinsics.release(shared.stop, 1)
                failed |= outcome
                thread += threads
            if cuda.syncthreads_or(failed):
                return

    return run
