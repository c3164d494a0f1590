"""Layout of a launch table: its records, by the names of their words, and its longest size.

The host writes tables in this layout (job.py), and launch_table.py reads them on the device. No
compiler is needed for this half.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "LINE_NBYTES",
    "NUM_WORDS",
    "THREADS",
    "VECTOR_NBYTES",
    "ItemHead",
    "ItemRecord",
    "TableHeader",
]

THREADS = 256  # per block, at least: eight warps copy the words to shared memory
NUM_WORDS = 128  # arguments of a launch: 1 KiB of the possible 4 KiB
VECTOR_NBYTES = 16
# A line of the L2 cache: the shares of blocks begin at multiples of it in a buffer.
LINE_NBYTES = 128


class TableHeader(NamedTuple):
    """First words of a launch table."""

    num_pieces: int
    num_items: int
    num_sources: int
    num_targets: int
    first_target: int  # its position among the addresses of an item
    divisor: int
    per_thread: int  # vectors per thread in a piece
    width: int  # addresses of an item
    numbers: int  # index of the first number for the kernel


class ItemHead(NamedTuple):
    """Words by which a block finds the item of a piece."""

    first_piece: int
    record: int  # its index


class ItemRecord(NamedTuple):
    """First words of the record of an item."""

    num_axes: int  # 0: contiguous arrays
    before: int  # elements before the first whole vector
    units: int  # whole vectors; elements where there are axes
    after: int  # elements after the last whole vector
    is_alike: int  # whether all arrays have the strides of the first
