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
from collections.abc import Callable
from typing import Any

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import intrinsics, launch_table, records, span
from dvkernels.kernels.cuda.engine.cuda_target import cuda
from dvkernels.kernels.cuda.engine.operations import Operation
from dvkernels.kernels.cuda.engine.table_layout import LINE_NBYTES
from dvkernels.kernels.cuda.multi_gpu.flag_program import (
    COMBINE,
    LAUNCH_NBYTES,
    ROW_NBYTES,
    ROWS,
    SIGNAL,
    CombineRow,
    FlagRow,
    LaunchHeader,
    ProgramHeader,
)

__all__ = ["build_row", "build_waiting"]


_POLLS = 64  # between reads of the clock and of the stop word, which take 1 us over PCIe
_NAP_NS = 100


_launch, _program = records.at(LaunchHeader), records.at(ProgramHeader)
_combine_row, _flag_row = records.at(CombineRow), records.at(FlagRow)


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
def _row(operation: Operation, code: int, threads: int) -> Any:
    """Return the device function that runs a Combine row."""
    line = LINE_NBYTES // arithmetic.dtype_of(code).itemsize
    reduce = span.reducer(operation, code, threads)

    @intrinsics.inlined
    def run(launch, program, row):  # type: ignore[no-untyped-def]
        header, combine = _launch(launch), _combine_row(row)
        share = combine.part * cuda.gridDim.x + cuda.blockIdx.x
        begin = min(span.start(header.share, header.num_larger, share) * line, header.length)
        end = min(span.start(header.share, header.num_larger, share + 1) * line, header.length)
        reduce(
            launch + LAUNCH_NBYTES,
            program + 8 * combine.positions,
            (
                combine.num_sources,
                combine.num_targets,
                header.divisor if combine.completes else 1,
            ),
            begin,
            end,
        )

    return run


@functools.cache
def build_row(operation: Operation, code: int, threads: int) -> Callable[..., None]:
    """Return the kernel that runs one Combine row, without waiting."""
    run_row = _row(operation, code, threads)

    def run(words):  # type: ignore[no-untyped-def]
        launch = launch_table.stage(words)
        header = _launch(launch)
        row = header.program + 8 * ROWS + ROW_NBYTES * header.row
        run_row(launch, header.program, row)

    return run


@functools.cache
def build_waiting(operation: Operation, code: int, threads: int) -> Callable[..., None]:
    """Return the kernel that runs all rows of a rank, and waits for the other ranks."""
    run_row = _row(operation, code, threads)

    def run(words):  # type: ignore[no-untyped-def]
        launch = launch_table.stage(words)
        program = _launch(launch).program
        for number in range(_program(program).num_rows):
            address = program + 8 * ROWS + ROW_NBYTES * number
            if _combine_row(address).kind == COMBINE:
                run_row(launch, program, address)
                continue
            # Read again for each row: values kept across rows would cost registers in run_row.
            header, shared, row = _launch(launch), _program(program), _flag_row(address)
            wanted, flags = header.epoch + row.stage, program + 8 * row.flags
            own_flags = cuda.blockIdx.x * shared.flags_nbytes
            thread = cuda.threadIdx.x
            if row.kind == SIGNAL:
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
