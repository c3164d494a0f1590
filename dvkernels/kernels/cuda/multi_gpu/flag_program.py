"""Program of a rank in a protocol between GPUs, as words that flag_kernel.py reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dvkernels.kernels.cuda.engine.table_layout import LINE_NBYTES
from dvkernels.schedules import partition
from dvkernels.schedules.flag_protocol import Combine, Memory, Protocol, Signal

__all__ = [
    "COMBINE",
    "LAUNCH_NBYTES",
    "ROWS",
    "ROW_NBYTES",
    "SIGNAL",
    "CombineRow",
    "FlagRow",
    "LaunchHeader",
    "ProgramHeader",
    "SharedAddresses",
    "flags_nbytes",
    "program_words",
    "shares",
]

COMBINE, SIGNAL, _WAIT = range(3)  # kinds of rows
_MEMORIES: tuple[Memory, ...] = ("input", "output", "slot")


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


LAUNCH_NBYTES, ROW_NBYTES = 8 * len(LaunchHeader._fields), 8 * len(CombineRow._fields)
ROWS = len(ProgramHeader._fields)  # index of the first row


def flags_nbytes(num_ranks: int) -> int:
    """Return the bytes from a block's flags, one per writer, to the next block's: whole lines.

    So a block does not poll a line that others write for another block.
    """
    return -(-8 * num_ranks // LINE_NBYTES) * LINE_NBYTES


def program_words(protocol: Protocol, rank: int, addresses: SharedAddresses) -> list[int]:
    """Return the words of a rank's program."""
    num_ranks = protocol.num_ranks
    rows = protocol.rows[rank]
    lists: list[int] = []
    lists_begin = ROWS + len(CombineRow._fields) * len(rows)

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
            words += CombineRow(COMBINE, row.part, positions, *counts, int(row.completes))
        elif isinstance(row, Signal):
            flags = append_list([addresses.flags[peer] + 8 * rank for peer in row.ranks])
            words += FlagRow(SIGNAL, row.stage, flags, len(row.ranks), 0)
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
    line = LINE_NBYTES // itemsize
    return partition.widths(-(-length // line), num_parts * num_blocks)
