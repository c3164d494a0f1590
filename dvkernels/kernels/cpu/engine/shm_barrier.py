"""A meeting of processes in memory that they share: each says what it brings, and waits.

The memory has a line of eight words for each member, which that member alone writes:

    [0] the latest round that it has come to
    [1] [2] what it brings to an even, an odd round: a number that must be equal for all
    [3] [4] of how many bytes

A member comes to round k + 1 only after it has found all others in round k, so what it brought to
round k stays readable until it comes to round k + 2: two places are enough.
"""

from __future__ import annotations

from typing import Any

from numba import types

from dvkernels.kernels import jit
from dvkernels.kernels.cpu.engine import intrinsics

__all__ = [
    "AGREED",
    "ENDED",
    "LATE",
    "OTHERWISE",
    "await_members",
    "await_round",
    "come",
    "come_to",
]


# What a wait found: all came and brought the same; some are not there yet; some brought something
# else; the group has ended.
AGREED, LATE, OTHERWISE, ENDED = 0, 1, 2, 3


@jit.njit("int64(int64, int64, int64, int64, int64)", nogil=True)
def await_members(lines, count, rank, number, num_pauses):  # type: ignore[no-untyped-def]
    """Spin at most ``num_pauses`` times for the members; word -8 of the lines ends it."""
    place = 1 + (number & 1)
    mine = intrinsics.load_shared(lines + 64 * rank, place)
    outcome = 0
    turn = 0
    for member in range(count):
        line = lines + 64 * member
        while intrinsics.load_shared(line, 0) < number:
            if intrinsics.load_shared(lines, -8) != 0:
                return 3
            if turn >= num_pauses:
                return 1
            intrinsics.relax(turn)
            turn += 1
        if intrinsics.load_shared(line, place) != mine:
            outcome = 2
    # Looked at last: a member that has ended the group brings nothing that counts.
    if intrinsics.load_shared(lines, -8) != 0:
        return 3
    return outcome


@jit.njit("int64(int64, int64, int64, int64, int64)", nogil=True)
def come_to(lines, rank, number, brings, nbytes):  # type: ignore[no-untyped-def]
    """Come to a round."""
    line = lines + 64 * rank
    intrinsics.store_shared(line, 1 + (number & 1), brings)
    intrinsics.store_shared(line, 3 + (number & 1), nbytes)
    intrinsics.store_shared(line, 0, number)
    return 0


# The same for Python: the functions behind the dispatchers have less to do for each call.
await_round: Any = await_members.get_overload((types.int64,) * 5)
come: Any = come_to.get_overload((types.int64,) * 5)
